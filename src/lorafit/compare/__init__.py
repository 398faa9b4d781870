"""LoRA against full fine-tuning on the user's data, or one method's learning rates: runs, measuring, telling."""
