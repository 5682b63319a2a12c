"""`/v1/embeddings`: texts to unit vectors, as numbers or as base64 of little-endian float32."""

import asyncio
import base64

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.errors import UserError
from internjax.serve.embed import embed
from internjax.serve.http.call import call_of
from internjax.serve.http.requests import beside, reserve
from internjax.serve.http.service import Service
from internjax.serve.schema import EmbeddingBody


async def embeddings(service: Service, body: EmbeddingBody, http: Request) -> Response:
    """Embeds texts or ids."""
    served, call = service.models.find(body.model), call_of(http)
    call.model = served.name
    engine = service.engine.engine
    width = engine.cfg.d_model
    if body.dimensions not in (None, width):
        raise UserError(
            f"dimensions={body.dimensions}: this model's vectors have {width} numbers, and it was "
            "not trained so that fewer of them keep the meaning."
        )
    texts = await asyncio.to_thread(_encode, service, body)
    tokens = sum(map(len, texts))
    reserve(service, call, tokens)
    params = engine.adapters.params_of(served.adapter)
    vectors = await beside(service, embed, params, engine.cfg, texts)
    call.prompt_tokens = tokens
    written = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
    data = [
        {"object": "embedding", "index": index, "embedding": written(vector)}
        for index, vector in enumerate(vectors)
    ]
    spent = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": spent})


def _encode(service: Service, body: EmbeddingBody) -> list[list[int]]:
    texts = [service.encode(t) if isinstance(t, str) else list(t) for t in body.texts()]
    for ids in texts:
        service.engine.engine.check_prompt(ids)
    return texts


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
