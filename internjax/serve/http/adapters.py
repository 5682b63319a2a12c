"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them.

Off unless the operator names a folder: whoever may call these reads files of the server.
https://docs.vllm.ai/en/latest/features/lora.html
"""

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field, StringConstraints

from internjax.serve.http.errors import ApiError
from internjax.serve.http.service import Service
from internjax.serve.schema import Body

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./:-]{1,256}$")]


class LoadBody(Body):
    """A PEFT folder and the name under which it will be asked."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadBody(Body):
    lora_name: Name


def add_adapters(app: FastAPI, service: Service) -> None:
    """Adds the routes that load and unload adapters."""
    turn = asyncio.Lock()  # a name is in the engine and among the models, or in neither

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> Response:
        folder = _inside(service.adapters_dir, body.lora_path)
        async with turn:
            service.models.check_new(body.lora_name)
            adapters = service.engine.engine.adapters
            await asyncio.to_thread(adapters.load, body.lora_name, folder)
            service.models.add(body.lora_name, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> Response:
        _allowed(service.adapters_dir)
        async with turn:
            served = service.models.remove(body.lora_name)
            service.engine.engine.adapters.unload(served.adapter)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _allowed(root: Path | None) -> Path:
    if root is None:
        raise ApiError(
            403,
            "loading adapters is off: the server was started without serve.adapters_dir.",
            code="adapters_off",
        )
    return root.resolve()


def _inside(root: Path | None, given: str) -> Path:
    """Returns a folder below the root; tells nothing of what lies outside of it."""
    root = _allowed(root)
    try:
        folder = (root / given).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, too long, a loop of links
        raise ApiError(400, "lora_path: no path of a folder.", param="lora_path") from error
    if not folder.is_relative_to(root):
        raise ApiError(
            403, "lora_path: it must lie in the server's adapters_dir.", param="lora_path"
        )
    return folder
