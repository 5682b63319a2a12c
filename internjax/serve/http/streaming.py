"""Server-sent events."""

import json
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from internjax.serve.answers import AnswerFailed
from internjax.serve.http.errors import ApiError


def stream(chunks: AsyncIterator[dict]) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except AnswerFailed as error:
            body = ApiError(500, str(error), code="engine").body()
            yield f"data: {json.dumps({'error': body})}\n\n"
        finally:
            await chunks.aclose()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
