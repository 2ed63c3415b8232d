"""Text to token ids and back: POST /tokenize and /detokenize, in the shapes of vLLM, which
llama.cpp's clients can read as well."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from pronk.core.errors import UserError
from pronk.core.files import is_unicode
from pronk.engine.prompts import Chat
from pronk.server import openai_types as t
from pronk.server.auth import Caller, caller
from pronk.server.models import Lease
from pronk.server.schema import Answer, Body
from pronk.server.service import Call, refuse
from pronk.text.messages import messages_from_dicts
from pronk.text.tools import tools_from_dicts

router = APIRouter(tags=["tokens"])

Inference = Annotated[Caller, Depends(caller("inference", limited=False))]


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = Field(default=None, description="A text.")
    content: str | None = Field(default=None, description="The same, as llama.cpp calls it.")
    messages: list[t.ChatMessage] | None = Field(
        default=None, description="Or a chat, up to the answer."
    )
    tools: list[t.FunctionTool] | None = None
    add_special_tokens: bool = Field(default=True, description="BOS, if the model wants one.")
    parse_special: bool = Field(
        default=False, description="Texts of special tokens become these tokens."
    )
    return_token_strs: bool = False


class TokenizeResponse(Answer):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


class DetokenizeResponse(Answer):
    prompt: str
    content: str
    """The same, as llama.cpp calls it."""


@router.post("/tokenize", response_model=TokenizeResponse, summary="Token ids of a text or a chat")
async def tokenize(request: Request, body: TokenizeRequest, who: Inference) -> dict[str, Any]:
    texts = [text for text in (body.prompt, body.content) if text is not None]
    given = len(texts) + (body.messages is not None)
    refuse(given != 1, "prompt", "give one of prompt, content and messages")
    if body.messages is None:
        refuse(body.tools is not None, "tools", "only a chat (messages) has tools")
    else:
        refuse(body.parse_special, "parse_special", "a chat's texts have no special tokens")
    lease = await model_of(Call.of(request, who), body.model)
    try:
        tokenizer, prompter = lease.llm.tokenizer, lease.llm.prompter

        def ids() -> list[int]:
            if body.messages is not None:
                return prompter.chat_ids(_chat(body))
            refuse(not is_unicode(texts[0]), "prompt", "has half of a surrogate pair")
            bos = body.add_special_tokens and tokenizer.add_bos
            return tokenizer.encode(texts[0], bos=bos, special=body.parse_special)

        tokens = await asyncio.to_thread(ids)
        answer: dict[str, Any] = {
            "tokens": tokens, "count": len(tokens), "max_model_len": lease.llm.context,
        }  # fmt: skip
        if body.return_token_strs:
            answer["token_strs"] = [
                tokenizer.token_bytes(id).decode("utf-8", "replace") for id in tokens
            ]
        return answer
    finally:
        lease.release()


@router.post("/detokenize", response_model=DetokenizeResponse, summary="The text of token ids")
async def detokenize(request: Request, body: DetokenizeRequest, who: Inference) -> dict[str, Any]:
    lease = await model_of(Call.of(request, who), body.model)
    try:
        text = await asyncio.to_thread(lease.llm.tokenizer.decode, body.tokens)
    except UserError as error:
        raise UserError(f"tokens: {error}") from None
    finally:
        lease.release()
    return {"prompt": text, "content": text}


def _chat(body: TokenizeRequest) -> Chat:
    assert body.messages is not None
    tools = [
        {
            "type": "function",
            "function": tool.function.model_dump(exclude_none=True, exclude={"strict"}),
        }
        for tool in body.tools or ()
    ]
    messages = messages_from_dicts([m.model_dump(exclude_none=True) for m in body.messages])
    return Chat(messages, tools_from_dicts(tools))


async def model_of(call: Call, name: str | None) -> Lease:
    """A lease of the named model, or of the first one."""
    return await call.model(name if name is not None else call.service.models.default.name)
