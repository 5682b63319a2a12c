"""What is served, whether it is well, and text to tokens and back."""

import asyncio

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from internjax.data.chat import encode_prompt
from internjax.errors import UserError
from internjax.serve.http.errors import RETRY_SECONDS
from internjax.serve.http.service import Service
from internjax.serve.schema import DetokenizeBody, EncodeBody, TokenizeBody


def add_info(app: FastAPI, service: Service) -> None:
    """Adds the routes that generate nothing."""
    context = service.engine.engine.context

    @app.get("/health")
    async def health() -> Response:
        engine = service.engine
        if engine.ready:
            return JSONResponse({"status": "ok"})
        said = {"status": engine.status, "reason": engine.reason}
        return JSONResponse(said, 503, {"Retry-After": str(RETRY_SECONDS)})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models.cards(context)})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.models.card(name, context))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise UserError("give prompt or messages, one of the two.")
        _check_model(service, body.model)
        if body.messages is not None:
            work = (encode_prompt, service.tokenizer, service.template, body.messages)
            ids = await asyncio.to_thread(*work)
        else:
            ids = await _encode(service, body.prompt, body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": context})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What evaluation harnesses ask before they let the server tokenize."""
        tokenizer = service.tokenizer
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        names = {
            f"{role}_token": None if i is None else tokenizer.token_bytes(i).decode()
            for role, i in ids.items()
        }
        template = tokenizer.chat_template
        return JSONResponse(
            {**names, "add_bos_token": tokenizer.adds_bos, "chat_template": template}
        )

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        _check_model(service, body.model)
        for token in body.tokens:
            if not 0 <= token < service.engine.engine.cfg.vocab_size:
                raise UserError(f"tokens: id {token} is not of this vocabulary.")
        return JSONResponse({"prompt": service.tokenizer.decode(body.tokens)})

    @app.post("/v1/encode")
    async def encode(body: EncodeBody) -> Response:
        """LMDeploy's form of /tokenize: one text or several, raw or as a user's turn."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        encoded = [await _encode(service, text, body.add_bos, body.do_preprocess) for text in texts]
        lengths = [len(ids) for ids in encoded]
        if isinstance(body.input, str):
            return JSONResponse({"input_ids": encoded[0], "length": lengths[0]})
        return JSONResponse({"input_ids": encoded, "length": lengths})


def _check_model(service: Service, name: str | None) -> None:
    if name is not None:
        service.models.find(name)


async def _encode(service: Service, text: str, add_bos: bool, as_turn: bool = False) -> list[int]:
    if as_turn:
        messages = [{"role": "user", "content": text}]
        return await asyncio.to_thread(encode_prompt, service.tokenizer, service.template, messages)
    return await asyncio.to_thread(service.encode, text, add_bos=add_bos)
