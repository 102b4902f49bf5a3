"""Every failure as OpenAI's error object, and every request with an id to find it by in the logs."""

from __future__ import annotations

import logging
import math
import re
import uuid

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.schemas import ErrorObject, ErrorResponse
from serve_app.errors import AuthenticationFailed, InvalidRequest, Overloaded, ServiceError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class NotReady(ServiceError):
    """A stage has no replica."""

    status = 503
    code = "not_ready"


class NoSuchRoute(ServiceError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowed(ServiceError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_supported"


def error_response(error: ServiceError) -> JSONResponse:
    body = ErrorResponse(error=ErrorObject(message=error.message, type=error.type, param=error.param, code=error.code))
    return JSONResponse(body.model_dump(), error.status, _headers(error))


def _headers(error: ServiceError) -> dict[str, str]:
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, AuthenticationFailed):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    if error.status >= 500:
        logger.warning("request %s: %s: %s", request.state.request_id, type(error).__name__, error.message)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """What Starlette raises by itself: no such route, or no such method on it."""
    assert isinstance(error, HTTPException)
    url = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        response = error_response(NoSuchRoute(f"Invalid URL ({url})."))
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        response = error_response(MethodNotAllowed(f"Invalid method ({url}); allowed: {allowed}."))
    else:
        raise error
    response.headers.update(error.headers or {})
    return response


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """A header that FastAPI could not read."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return error_response(InvalidRequest(f"`{name}`: {first['msg']}.", param=name, code="invalid_value"))


class RequestBoundary:
    """Gives a request its id, and turns an exception that nobody expected into a 500 that tells nothing of the inside.

    ``scope["state"]["request_id"]`` is the client's ``x-request-id`` where that is short and plain, else a new one.
    set_header: send the id with the response too. Off behind a proxy that already does.

    Cancellation passes through: the client has left, and there is nobody to answer.
    """

    def __init__(self, app: ASGIApp, *, set_header: bool = True):
        self.app = app
        self.set_header = set_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self.set_header:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.info("request %s: the client left", request_id)
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            error = ServiceError(f"The server had an error while processing your request ({request_id}).")
            await error_response(error)(scope, receive, send_with_id)


def _request_id(client_id: str | None) -> str:
    if client_id is not None and SANE_REQUEST_ID.fullmatch(client_id):
        return client_id
    return f"req_{uuid.uuid4().hex}"
