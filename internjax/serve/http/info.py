"""What is served, whether it is well, and text to tokens and back."""

from dataclasses import asdict

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from internjax.data.chat import encode_prompt
from internjax.errors import UserError
from internjax.serve.http.service import Service, check_model, encode
from internjax.serve.schema import DetokenizeBody, TokenizeBody


def add_info(app: FastAPI, service: Service) -> None:
    engine = service.engine.engine
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "internjax",
        "max_model_len": engine.context,
    }

    @app.get("/health")
    async def health() -> Response:
        closing = service.engine.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(service, name)
        return JSONResponse(card)

    @app.get("/metrics")
    async def metrics() -> Response:
        lines = [f"internjax_{k} {v}" for k, v in asdict(engine.stats).items()]
        lines.append(f"internjax_in_flight {engine.in_flight()}")
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise UserError("give prompt or messages, one of the two.")
        if body.messages is not None:
            ids = encode_prompt(service.tokenizer, service.template, body.messages)
        else:
            ids = encode(service, body.prompt, body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.context})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        return JSONResponse({"prompt": service.tokenizer.decode(body.tokens)})
