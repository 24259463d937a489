"""A proxy before servers that compute prompts and servers that answer, as vLLM describes it.

python examples/prefill_decode/proxy.py --prefill URL... --decode URL... [--host HOST] [--port PORT]

It takes /v1/completions and /v1/chat/completions. A prompt goes to one of the first servers, which
says where its pages are; then the request goes, with that, to one of the others, and the answer
comes from there.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATHS = ("/v1/completions", "/v1/chat/completions")
# Asks a server to keep a prompt's pages for another, and to say where they are.
FOR_ANOTHER = {"do_remote_decode": True, "do_remote_prefill": False}
# The first server's answer is not used: these would be wrong for one token, or wasted.
DROPPED = (
    *("stream", "stream_options", "max_completion_tokens", "min_tokens"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "echo"),
)
HANDED_ON = ("authorization", "x-request-id")
CONNECT_S = 10
HEALTH_S = 5
CLIENT_LEFT = 499


class FailedError(Exception):
    """A request that gets an answer of the proxy's own."""

    def __init__(self, status: int, message: str) -> None:
        """Take the HTTP status and what to say."""
        super().__init__(message)
        self.status = status


class Proxy:
    """Before the servers at URLs of each kind, which take turns."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        """Take the URLs, without a slash at the end."""
        self._servers = [*prefill, *decode]
        self._prefill, self._decode = cycle(prefill), cycle(decode)
        # Answers take any time, and each is a connection. None is used again: a server may have
        # closed it.
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def app(self) -> Starlette:
        """The application to serve."""
        routes = [Route(path, self._serve, methods=["POST"]) for path in PATHS]
        health = Route("/health", self._health)
        return Starlette(routes=[*routes, health], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._client:
            yield

    async def _health(self, request: Request) -> Response:
        for url in self._servers:
            try:
                response = await self._client.get(f"{url}/health", timeout=HEALTH_S)
                response.raise_for_status()
            except httpx.HTTPError as error:
                return _error(503, f"{url}: {error!r}")
        return Response()

    async def _serve(self, request: Request) -> Response:
        try:
            asked = await _read(request)
            headers = {name: request.headers[name] for name in HANDED_ON if name in request.headers}
            answer = await _unless_left(request, self._answer(request.url.path, asked, headers))
        except FailedError as failed:
            return _error(failed.status, str(failed))
        return StreamingResponse(
            _stream(answer),
            answer.status_code,
            media_type=answer.headers.get("content-type"),
        )

    async def _answer(
        self, path: str, asked: dict[str, Any], headers: dict[str, str]
    ) -> httpx.Response:
        """The beginning of a response; its body is still to be read."""
        filled = await self._send(next(self._prefill), path, for_prefill(asked), headers)
        if filled.is_error:
            return filled
        await filled.aread()
        transfer = filled.json().get("kv_transfer_params")
        if transfer is None:
            raise FailedError(
                502, f"{filled.url} keeps no pages: was it given --kv-transfer-config?"
            )
        both = {**asked, "kv_transfer_params": transfer}
        return await self._send(next(self._decode), path, both, headers)

    async def _send(
        self, url: str, path: str, asked: dict[str, Any], headers: dict[str, str]
    ) -> httpx.Response:
        request = self._client.build_request("POST", url + path, json=asked, headers=headers)
        try:
            return await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise FailedError(502, f"{url} does not answer: {error!r}") from error


async def _read(request: Request) -> dict[str, Any]:
    try:
        asked = await request.json()
    except ValueError as error:
        raise FailedError(400, f"the body is no JSON: {error}") from error
    if not isinstance(asked, dict):
        raise FailedError(400, f"the body is a JSON {type(asked).__name__}; an object is allowed")
    if refusal := why_refused(asked):
        raise FailedError(400, refusal)
    return asked


async def _unless_left(
    request: Request, answer: Coroutine[Any, Any, httpx.Response]
) -> httpx.Response:
    """Wait for an answer as long as the client does."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(leave())
    await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not answering.done():
        answering.cancel()
        raise FailedError(CLIENT_LEFT, "the client left")
    return answering.result()


async def _stream(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    finally:
        await answer.aclose()


def why_refused(asked: dict[str, Any]) -> str | None:
    """Say what of a request cannot be divided among two servers; None if all can."""
    if (asked.get("n") or 1) != 1:
        return f"n={asked['n']}: one answer a request is served here; send the prompt n times"
    if asked.get("use_beam_search"):
        return "use_beam_search: beams are not divided among servers; ask one server alone"
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return f"{len(prompt)} prompts in one request: one is served here; send them one by one"
    return None


def for_prefill(asked: dict[str, Any]) -> dict[str, Any]:
    """The request that makes a server compute the prompt alone."""
    kept = {name: value for name, value in asked.items() if name not in DROPPED}
    return {**kept, "max_tokens": 1, "kv_transfer_params": FOR_ANOTHER}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Serve prefill and decode on servers apart.")
    parser.add_argument("--prefill", nargs="+", required=True, help="servers of role kv_producer")
    parser.add_argument("--decode", nargs="+", required=True, help="servers of role kv_consumer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (%(default)s)")
    args = parser.parse_args()
    proxy = Proxy([url.rstrip("/") for url in args.prefill], [u.rstrip("/") for u in args.decode])
    uvicorn.run(proxy.app(), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
