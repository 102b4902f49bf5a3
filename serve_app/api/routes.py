"""The OpenAI-compatible HTTP API as a FastAPI application."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from serve_app import __version__
from serve_app.api.auth import ApiKeys
from serve_app.api.errors import NotReady, RequestBoundary, install_error_handlers
from serve_app.api.form import ServedModel, form_schema, parse_form
from serve_app.api.formats import render
from serve_app.api.limits import BodyLimit, upload_too_large, while_connected
from serve_app.api.schemas import (
    ErrorResponse,
    Health,
    Model,
    ModelList,
    Readiness,
    Transcription,
    VerboseTranscription,
)
from serve_app.api.service import Service
from serve_app.engine.options import Priority, Task, TranscribeOptions
from serve_app.errors import InvalidRequest
from serve_app.settings import Settings

BEARER = HTTPBearer(auto_error=False, description="One of the server's API keys.")
PriorityHeader = Annotated[Priority, Header(description="Of the windows waiting, interactive ones go first.")]
TimeoutHeader = Annotated[
    float, Header(gt=0, allow_inf_nan=False, description="Seconds until the request is given up: at most the default.")
]


def build_api(service: Service, settings: Settings, *, set_request_id: bool = True) -> FastAPI:
    """The application over a service.

    set_request_id: send ``x-request-id`` with every response. Off behind a proxy that does so itself, as Ray Serve's.
    Raises ValueError where the settings' API keys cannot be used.
    """
    app = FastAPI(
        title="whisper-serve",
        version=__version__,
        description="Speech to text through OpenAI's audio API.",
        redirect_slashes=False,
    )
    keys = ApiKeys.from_settings(settings.http)
    protected = [] if keys is None else [Depends(_authentication(keys))]
    app.include_router(_audio_routes(service, settings), dependencies=protected)
    app.include_router(_model_routes(service), dependencies=protected)
    app.include_router(_health_routes(service))
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_upload_bytes=settings.audio.max_upload_bytes)
    app.add_middleware(RequestBoundary, set_header=set_request_id)
    return app


def _authentication(keys: ApiKeys) -> Callable[..., Coroutine[Any, Any, None]]:
    async def authenticate(credentials: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]) -> None:
        keys.check(credentials.credentials if credentials else None)

    return authenticate


def _served_model(service: Service) -> ServedModel:
    return ServedModel(service.model_name, service.languages)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For /docs. ``default`` keeps FastAPI from adding an error of its own shape."""
    descriptions = {
        400: "The request cannot be understood, or asks for what the server does not do",
        401: "No API key, or an unknown one",
        404: "The model is not served here",
        413: "The recording passes a limit",
        429: "The queues are full: come again after Retry-After seconds",
        503: "A stage has no replica",
        504: "The request's time is over",
    }
    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": descriptions[status]} for status in statuses
    }
    return documented | {"default": {"model": ErrorResponse, "description": "Any other failure"}}


def _audio_routes(service: Service, settings: Settings) -> APIRouter:
    router = APIRouter(prefix="/v1/audio", tags=["audio"])
    limit_s = settings.request.timeout_s

    async def answer(request: Request, task: Task, priority: Priority, timeout_s: float) -> Response:
        options = TranscribeOptions(task=task, priority=priority, timeout_s=min(timeout_s, limit_s))
        form = await _read_form(request)
        try:
            asked = parse_form(form.multi_items(), options, _served_model(service))
            if (asked.audio.size or 0) > settings.audio.max_upload_bytes:
                raise upload_too_large(settings.audio.max_upload_bytes)
            transcript = await while_connected(request.receive, service.transcribe(asked.audio.file, asked.options))
        finally:
            await form.close()
        body, media_type = render(transcript, asked.response_format)
        return Response(body, media_type=media_type)

    def documentation(task: Task) -> dict[str, Any]:
        form = {"required": True, "content": {"multipart/form-data": {"schema": form_schema(task)}}}
        success = {
            "description": "The transcript in the asked format: JSON for json and verbose_json, else plain text",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
        return {
            "response_model": Transcription | VerboseTranscription,
            "responses": {200: success, **_errors(400, 401, 404, 413, 429, 504)},
            "openapi_extra": {"requestBody": form},
        }

    @router.post("/transcriptions", **documentation("transcribe"))
    async def transcriptions(
        request: Request, x_priority: PriorityHeader = "normal", x_request_timeout: TimeoutHeader = limit_s
    ) -> Response:
        """Transcribe a recording in the language spoken."""
        return await answer(request, "transcribe", x_priority, x_request_timeout)

    @router.post("/translations", **documentation("translate"))
    async def translations(
        request: Request, x_priority: PriorityHeader = "normal", x_request_timeout: TimeoutHeader = limit_s
    ) -> Response:
        """Translate a recording's speech into English text."""
        return await answer(request, "translate", x_priority, x_request_timeout)

    return router


async def _read_form(request: Request) -> FormData:
    """The multipart form. The file is on disk beyond 1 MiB (Starlette)."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise InvalidRequest(
            f"Unsupported content type '{content_type[:80]}': send the recording as multipart/form-data.",
            code="unsupported_content_type",
        )
    try:
        return await request.form(max_files=1, max_fields=100)
    except HTTPException as error:
        raise InvalidRequest(f"The form cannot be read: {error.detail}", code="invalid_form") from error
    except UnicodeError as error:
        raise InvalidRequest("The form cannot be read: its charset is unusable.", code="invalid_form") from error


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/models", tags=["models"])

    def model(name: str) -> Model:
        return Model(id=name, created=service.created)

    @router.get("", responses=_errors(401))
    async def list_models() -> ModelList:
        """The served model, by each of its names."""
        return ModelList(data=[model(name) for name in _served_model(service).names])

    @router.get("/{name:path}", responses=_errors(401, 404))
    async def retrieve_model(name: str) -> Model:
        _served_model(service).require(name)
        return model(name)

    return router


def _health_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", responses=_errors())
    async def healthz() -> Health:
        """The process is alive."""
        return Health()

    @router.get("/readyz", responses=_errors(503))
    async def readyz() -> Readiness:
        """Every stage has a replica."""
        stages = await service.ready()
        missing = [stage for stage, up in stages.items() if not up]
        if missing or not stages:
            raise NotReady(f"Not ready; without a replica: {', '.join(missing) or 'every stage'}.")
        return Readiness(stages=stages)

    @router.get("/", include_in_schema=False)
    async def index() -> dict[str, str]:
        return {"name": "whisper-serve", "version": __version__, "docs": "/docs", "models": "/v1/models"}

    return router
