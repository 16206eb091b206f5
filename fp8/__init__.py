"""FP8 training of Hugging Face models in plain torch: recipes, layers, optimizer, export.

    report = fp8.convert_to_float8_training(model, fp8.BlockScaling())
    optimizer = fp8.Float8AdamW(model.parameters(), lr=1e-4)
    fp8.save_pretrained_fp8(model, path)

The training loop is `fp8.train.train`. See docs/fp8.md.
"""

from fp8.convert import ConversionReport, convert_to_float8_training, revert_to_float
from fp8.diagnostics import Diagnosis, diagnose
from fp8.export import export_bf16, load_fp8, save_pretrained_fp8
from fp8.linear import Float8Linear, autocast
from fp8.optim import Float8AdamW, state_bytes
from fp8.recipe import (
    MXFP8,
    NVFP4,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Recipe,
    RowwiseScaling,
    recipe_named,
)
from fp8.rounding import compile_quantizers

__all__ = [
    "MXFP8",
    "NVFP4",
    "BlockScaling",
    "ConversionReport",
    "CurrentScaling",
    "DelayedScaling",
    "Diagnosis",
    "Float8AdamW",
    "Float8Linear",
    "Recipe",
    "RowwiseScaling",
    "autocast",
    "compile_quantizers",
    "convert_to_float8_training",
    "diagnose",
    "export_bf16",
    "load_fp8",
    "recipe_named",
    "revert_to_float",
    "save_pretrained_fp8",
    "state_bytes",
]
