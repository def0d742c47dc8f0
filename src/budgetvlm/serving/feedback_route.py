"""The route by which clients say what an answer was worth."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from budgetvlm.errors import OutputError
from budgetvlm.feedback.request_store import RequestStore
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.chat_schema import Text


class Feedback(BaseModel):
    """Body of POST /v1/feedback."""

    id: Text = Field(description="of the answer: its field `id`", max_length=200)
    score: float = Field(ge=0, le=1, allow_inf_nan=False, description="what it was worth, from 0 (wrong) to 1 (right)")


def feedback_routes(store: RequestStore | None) -> APIRouter:
    """Make the route; without a store it says that nothing is kept."""
    router = APIRouter()

    @router.post("/v1/feedback")
    async def feedback(body: Feedback) -> dict[str, Any]:
        """Say what an answer was worth. Saying it again changes nothing; another score takes the first one's place."""
        if store is None:
            raise APIError(404, "this server keeps no feedback; start it with --log_requests", code="feedback_off")
        try:
            known = await asyncio.wrap_future(store.feedback(body.id, body.score))
        except OutputError as error:
            raise APIError(503, str(error), code="not_kept", retry_after_s=1) from None
        if not known:
            raise APIError(
                404, "no answer of this id is kept: it is another server's, or so old that it made room for newer ones",
                code="answer_not_found", param="id",
            )  # fmt: skip
        return {"object": "feedback", "id": body.id, "score": body.score}

    return router
