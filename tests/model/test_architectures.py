"""The table of architectures: what is known, what is refused, what a multimodal file's tensors are called."""

from __future__ import annotations

import pytest

from lorafit.errors import ModelError
from lorafit.model.architectures import TEXT, WRAPPERS, own_name, text_config, unpackable


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lama"}, r"f: model_type: 'lama' is not supported yet; the nearest supported one is llama"),
        ({}, r"f: model_type: 'None' is not supported yet"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_txt"}},
            r"f: text_config.model_type: 'gemma3_txt' is not supported yet; the nearest supported one is gemma3_text",
        ),
        ({"model_type": "gemma3", "text_config": 3}, r"f: text_config: is '3', not an object"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            r"f: architectures: 'LlamaForSequenceClassification' is no language model",
        ),
        ({"model_type": "gemma3", "architectures": ["Gemma3Model"]}, r"'Gemma3Model' is no language model"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, r"is 50.0: capped attention scores are not"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, r"tokens see those after them"),
    ],
)
def test_what_we_do_not_know_is_refused_by_name(config, words):
    """Unknown types, of a text part too, name the nearest known one; classifiers and encoders are refused."""
    with pytest.raises(ModelError, match=words):
        text_config(config, "f", TEXT)


def test_a_text_part_may_leave_its_type_out():
    """Then it is the wrapper's usual one; the wrapper has the head, so its word on tying counts."""
    inner = {"hidden_size": 8, "tie_word_embeddings": True}
    found = text_config({"model_type": "gemma3", "tie_word_embeddings": False, "text_config": inner}, "f", TEXT)
    assert found == {"model_type": "gemma3_text", "hidden_size": 8, "tie_word_embeddings": False}
    assert text_config({"model_type": "llama", "x": 1}, "f", TEXT) == {"model_type": "llama", "x": 1}


@pytest.mark.parametrize(
    ("tensor", "own"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", None),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("vision_model.model.layers.0.self_attn.q_proj.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("mtp.layers.0.mlp.up_proj.weight", None),
        ("model.unheard_of.weight", "model.unheard_of.weight"),
    ],
)
def test_tensors_of_multimodal_files_have_the_text_models_names(tensor, own):
    """Old names and new; towers, projectors and heads for further tokens are no part; others stay, to be refused."""
    assert own_name(tensor) == own


def test_paths_in_adapters_are_those_of_transformers_wrappers():
    """The beginnings in the table are where transformers' own wrappers have their text part and head."""
    from builders.architectures import WRAPPED, tiny_wrapper

    for name in WRAPPED:
        model = tiny_wrapper(name)
        (_, text), (_, head) = WRAPPERS[name.partition("-")[0]].paths
        decoder = model.get_decoder()  # of Llama 4 the model with its head
        assert model.get_submodule(text.removesuffix(".")) is getattr(decoder, "model", decoder)
        assert model.get_submodule(head) is model.get_output_embeddings()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ""),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ""),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling dynamic depends on the longest row"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary scaling longrope depends on the longest row"),
        ({"model_type": "qwen3_next"}, "linear attention carries a state"),
    ],
)
def test_what_cannot_be_packed_says_why(more, words):
    """Rows that share a sequence must not change each other."""
    found = unpackable({"model_type": "llama", **more})
    assert words in found
    assert bool(words) == bool(found)
