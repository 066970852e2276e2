"""`dsv4 serve`: a model folder as a DeepSeek-compatible HTTP service with a chat page."""

from __future__ import annotations

import socket
from pathlib import Path

import typer


def serve(
    path: Path = typer.Argument(Path("models/nano"), help="The model folder."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 = every network this machine is on."),
    port: int = typer.Option(8000, help="Port to listen on; 0 = any free one."),
    dialect: str = typer.Option(None, help="Prompt dialect: v4-preview or v4-ga. Default: what the folder asks for."),
    api_key: str = typer.Option(None, envvar="DSV4_API_KEY", help="Key that clients must send. Default: none needed."),
    alias: list[str] = typer.Option(None, help="Another model name to answer to (repeatable; default: DeepSeek's)."),
    dtype: str = typer.Option("auto", help="float32, bfloat16, native (FP4/FP8 as stored), or auto: as the folder is."),
    expert_memory: str = typer.Option(
        None, help="With native: experts stay on disk, at most this much in memory: 8GiB."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int = typer.Option(0, help="Processor threads for the model; 0 = one per core."),
    strict_reasoning: bool = typer.Option(False, help="Refuse tool calls that come back without their reasoning."),
) -> None:
    """Serve a model over HTTP, with a chat page at /.

    Any OpenAI client can talk to it: give it the printed URL as its base URL. It answers POST /chat/completions and
    GET /models, with or without /v1.

    Example:
      dsv4 serve models/nano --port 8000
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port") from None

    import torch
    import uvicorn

    from dsv4.common.memory import keep_freed_memory
    from dsv4.server.app import create_app
    from dsv4.server.chat import ALIASES, Service

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    service = Service.load(path, dialect, dtype, device, alias or ALIASES, strict_reasoning, expert_memory)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    kind = ("native" if service.engine.config.expert_dtype else "float32") if dtype == "auto" else dtype
    where = f"{kind} on {device}, {torch.get_num_threads()} threads"
    key = ", key needed" if api_key else ""
    typer.echo(f"{service.name}: {service.parameters / 1e6:.1f}M parameters, {where}")
    typer.echo(f"context {service.engine.context:,} tokens, prompt dialect {service.dialect}")
    typer.echo(f"chat page  {address}/")
    typer.echo(f"API        {address}/v1  (models: {', '.join(service.models)}{key})")
    config = uvicorn.Config(create_app(service, api_key), log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])
