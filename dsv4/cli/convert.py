"""`dsv4 convert`: a model folder written again in another format, or a synthetic release."""

from __future__ import annotations

from pathlib import Path

import typer


def convert(
    paths: list[Path] = typer.Argument(..., metavar="[SRC] DST", help="The model folder, and the folder to write."),
    to: str = typer.Option("official", help="official (FP4/FP8 as released), bf16, or transformers (its names, bf16)."),
    quantise: bool = typer.Option(False, "--quantise", help="Allow rounding into FP4 and FP8."),
    expert_dtype: str = typer.Option(None, help="With --to official: fp4 or fp8. Default: as in SRC, else fp4."),
    ranks: int = typer.Option(None, min=1, help="Cut for so many devices. A folder so cut is joined again by itself."),
    synthesise: str = typer.Option(
        None, help="Instead of SRC: random full-size layers of flash, pro or another preset."
    ),
    layers: str = typer.Option(None, help="With --synthesise: which of its layers, such as 0,2,3. Default: all."),
    experts: int = typer.Option(None, min=1, help="With --synthesise: routed experts per layer. Default: all."),
) -> None:
    """Write a model folder in another format, or a synthetic release.

    Nothing is lost without --quantise. DST appears when it is complete; a stopped conversion goes on where it was when
    the same command is given again.

    Example:
      dsv4 convert models/nano nano-fp4 --to official --quantise
      dsv4 convert DeepSeek-V4-Flash flash-bf16 --to bf16
      dsv4 convert DeepSeek-V4-Flash flash-mp8 --ranks 8
      dsv4 convert --synthesise flash --layers 0,2,3 flash-slice
    """
    if len(paths) != (1 if synthesise else 2):
        raise ValueError(f"give {'DST alone' if synthesise else 'SRC and DST'}, got {len(paths)} folder(s)")
    if expert_dtype not in (None, "fp4", "fp8"):
        raise ValueError(f"--expert-dtype must be fp4 or fp8, got {expert_dtype!r}")
    if synthesise:
        if ranks:
            raise ValueError("--ranks cuts a folder that is there: synthesise it first")
        from dsv4.checkpoint.synthetic import synthesise as write
        from dsv4.config import Config

        try:
            chosen = [int(layer) for layer in layers.split(",")] if layers else None
        except ValueError:
            raise ValueError(f"--layers must be numbers such as 0,2,3, got {layers!r}") from None
        write(synthesise, chosen or list(range(Config.preset(synthesise).num_hidden_layers)), paths[0], experts=experts)
    elif ranks or any(paths[0].glob("model*-mp*.safetensors")):
        from dsv4.checkpoint.ranks import join, split

        if to != "official" or quantise or expert_dtype:
            raise ValueError("cutting and joining keep every byte: convert before or after")
        if ranks and any(paths[0].glob("model*-mp*.safetensors")):
            raise ValueError(f"{paths[0]} is cut already: join it first (dsv4 convert {paths[0]} DST)")
        split(paths[0], paths[1], ranks) if ranks else join(paths[0], paths[1])
    else:
        from dsv4.checkpoint.convert import convert as write_again

        write_again(paths[0], paths[1], to, quantise=quantise, expert_dtype=expert_dtype)
    typer.echo(f"wrote {paths[-1]}")
