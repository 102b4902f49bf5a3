"""A stand-in for the Kubernetes API server: as much of its contract as a controller can get wrong.

Versions and conflicts (409), what a PUT must carry (422), patches by content type (415, 400), status apart from the
rest, watches with 410 for what is too old, RBAC (401, 403) with narrowed names, dry runs, kinds that are not there (a
404 that is no Status), and outages: silence, refusal, errors. It keeps objects in memory and checks no schemas beyond
what is written here.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]

RAY, LEASES, EVENTS = "ray.io/v1", "coordination.k8s.io/v1", "events.k8s.io/v1"
KINDS = {
    (RAY, "rayservices"): "RayService",
    (LEASES, "leases"): "Lease",
    (EVENTS, "events"): "Event",
}
CUSTOM = {"rayservices"}
WITH_STATUS = {"rayservices"}
MERGE, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
"""Of Go's ``MicroTime``: just six digits."""
ADMIN, CONTROLLER = "admin-token", "controller-token"


@dataclass(frozen=True)
class Rule:
    """Of RBAC. names: of objects; none for all."""

    group: str
    resource: str
    verbs: frozenset[str]
    names: frozenset[str] = frozenset()


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str, **details: str):
        super().__init__(message)
        self.status = status
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": message,
            "details": details,
            "code": status,
        }


@dataclass
class Request:
    verb: str
    version: str
    plural: str
    namespace: str
    name: str | None
    part: str | None
    dry: bool
    token: str

    @property
    def resource(self) -> str:
        return self.plural if self.part is None else f"{self.plural}/{self.part}"


@dataclass
class ApiServer:
    """rules: what the controller's token may do; the administrator's may do all. used: verbs and resources that the
    controller's asked for, in order."""

    rules: list[Rule] = field(default_factory=list)
    kinds: dict[tuple[str, str], str] = field(default_factory=lambda: dict(KINDS))
    used: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._changes: list[tuple[int, str, tuple[str, str], Object]] = []
        self._compacted = 0
        self._version = 0
        self._changed = threading.Condition()
        self._outage: Literal["silent", "failing"] | None = None
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    # ---- its life ----

    def start(self) -> None:
        server = self

        class Handler(_Handler):
            api = server

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that is killed leaves its connections."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from now on, and those there are answer no more."""
        if self._server is not None:
            self.fall("silent")
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fall(self, how: Literal["silent", "failing"] | None) -> None:
        """silent: takes requests and never answers. failing: answers 503. None: is well again."""
        self._outage = how

    def kubeconfig(self, path: Path, token: str = CONTROLLER) -> Path:
        name = "stand-in"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def compact(self) -> None:
        """Forgets the changes so far: who watches from before them has to list anew."""
        with self._changed:
            self._compacted, self._changes = self._version, []

    # ---- what it does ----

    def answer(self, request: Request, content_type: str, body: bytes) -> Any:
        self._authorize(request)
        kind = self.kinds[request.version, request.plural]
        with self._changed:
            match request.verb:
                case "get":
                    return self._get(request)
                case "list":
                    items = [o for (p, n, _), o in self._objects.items() if (p, n) == _key(request)[:2]]
                    return {
                        "apiVersion": request.version,
                        "kind": f"{kind}List",
                        "metadata": {"resourceVersion": str(self._version)},
                        "items": copy.deepcopy(items),
                    }
                case "create":
                    return self._create(request, kind, _json(content_type, body))
                case "update":
                    return self._update(request, _json(content_type, body))
                case "patch":
                    return self._patch(request, content_type, body)
                case "delete":
                    gone = self._get(request)
                    del self._objects[_key(request)]
                    self._note("DELETED", request, gone)
                    return gone
        raise Refused(405, "MethodNotAllowed", f"{request.verb} is not allowed here")

    def _authorize(self, request: Request) -> None:
        group = request.version.partition("/")[0]
        if request.token == ADMIN:
            return
        if request.token != CONTROLLER:
            raise Refused(401, "Unauthorized", "Unauthorized")
        self.used.append((request.verb, request.resource))
        for rule in self.rules:
            named = not rule.names or request.name in rule.names
            if (rule.group, rule.resource) == (group, request.resource) and request.verb in rule.verbs and named:
                return
        name = f' "{request.name}"' if request.name else ""
        raise Refused(
            403,
            "Forbidden",
            f'{request.plural}.{group}{name} is forbidden: User "system:serviceaccount:{request.namespace}:controller" '
            f'cannot {request.verb} resource "{request.resource}" in API group "{group}" in the namespace '
            f'"{request.namespace}"',
            group=group,
            kind=request.plural,
        )

    def _get(self, request: Request) -> Object:
        found = self._objects.get(_key(request))
        if found is None:
            group = request.version.partition("/")[0]
            raise Refused(
                404,
                "NotFound",
                f'{request.plural}.{group} "{request.name}" not found',
                name=str(request.name),
                group=group,
                kind=request.plural,
            )
        return copy.deepcopy(found)

    def _create(self, request: Request, kind: str, given: Object) -> Object:
        metadata = given.setdefault("metadata", {})
        request.name = metadata.get("name")
        if not request.name:
            raise Refused(422, "Invalid", "metadata.name: Required value: name or generateName is required")
        if _key(request) in self._objects:
            raise Refused(409, "AlreadyExists", f'{request.plural} "{request.name}" already exists', name=request.name)
        _validate(request.plural, given)
        metadata |= {
            "namespace": request.namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if request.plural in WITH_STATUS:
            given.pop("status", None)
        return self._store("ADDED", request, {"apiVersion": request.version, "kind": kind, **given})

    def _update(self, request: Request, given: Object) -> Object:
        before = self._get(request)
        version = (given.get("metadata") or {}).get("resourceVersion")
        if not version:
            raise Refused(
                422, "Invalid", "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
            )
        if version != before["metadata"]["resourceVersion"]:
            raise Refused(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {request.plural} "{request.name}": the object has been modified; '
                "please apply your changes to the latest version and try again",
                name=str(request.name),
            )
        return self._replace(request, before, given)

    def _patch(self, request: Request, content_type: str, body: bytes) -> Object:
        before = self._get(request)
        allowed = {MERGE, JSON_PATCH} | (set() if request.plural in CUSTOM else {STRATEGIC})
        if content_type not in allowed:
            raise Refused(
                415,
                "UnsupportedMediaType",
                f"the body of the request was in an unknown format - accepted media types include: {sorted(allowed)}",
            )
        patch = _json("application/json", body)
        if content_type == JSON_PATCH:
            if not isinstance(patch, list):
                raise Refused(400, "BadRequest", "cannot unmarshal object into Go value of type jsonpatch.Patch")
            after = _json_patched(before, patch)
        else:
            if not isinstance(patch, dict):
                raise Refused(400, "BadRequest", "cannot unmarshal array into Go value of type map[string]interface {}")
            after = _merged(before, patch)
        if after["metadata"].get("resourceVersion") != before["metadata"]["resourceVersion"]:
            raise Refused(409, "Conflict", "the object has been modified")
        return self._replace(request, before, after)

    def _replace(self, request: Request, before: Object, given: Object) -> Object:
        """Of the object or of its status: the other stays as it was."""
        if request.plural in WITH_STATUS:
            if request.part == "status":
                given = {**before, "status": given.get("status")}
            else:
                given = {**given, "status": before.get("status")}
        _validate(request.plural, given)
        after = {**given, "apiVersion": before["apiVersion"], "kind": before["kind"]}
        after["metadata"] = {**before["metadata"], **given.get("metadata", {})}
        after["metadata"] |= {key: before["metadata"][key] for key in ("uid", "creationTimestamp", "name", "namespace")}
        return self._store("MODIFIED", request, after)

    def _store(self, what: str, request: Request, after: Object) -> Object:
        if request.dry:
            return after
        after["metadata"]["resourceVersion"] = str(self._version + 1)
        self._objects[_key(request)] = after
        self._note(what, request, after)
        return copy.deepcopy(after)

    def _note(self, what: str, request: Request, changed: Object) -> None:
        self._version += 1
        self._changes.append((self._version, what, (request.plural, request.namespace), copy.deepcopy(changed)))
        self._changed.notify_all()

    def changes(self, request: Request, since: int, seconds: float) -> Any:
        """Events of a watch, as they come. None, now and then, while nothing does."""
        self._authorize(request)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._changed:
                if since < self._compacted:
                    gone = Refused(410, "Expired", f"too old resource version: {since} ({self._compacted})")
                    yield {"type": "ERROR", "object": gone.body}
                    return
                new = [change for change in self._changes if change[0] > since]
                if not new:
                    self._changed.wait(0.1)
            for version, what, where, changed in new:
                since = version
                if where == (request.plural, request.namespace):
                    yield {"type": what, "object": changed}
            if not new:
                yield None


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.api._outage == "silent":
            while self.api._outage == "silent":
                time.sleep(0.05)
            self.close_connection = True
            return
        if self.api._outage == "failing":
            self._send(503, Refused(503, "ServiceUnavailable", "etcdserver: request timed out").body)
            return
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        request = self._request(url.path, query)
        if request is None:
            self._send_text(404, "404 page not found\n")
            return
        try:
            if request.verb == "watch":
                self._watch(request, query)
                return
            content_type = (self.headers.get("Content-Type") or "").partition(";")[0]
            found = self.api.answer(request, content_type, body)
            self._send(201 if request.verb == "create" else 200, found)
        except Refused as refused:
            self._send(refused.status, refused.body)

    def _request(self, path: str, query: Mapping[str, str]) -> Request | None:
        """None where there is no such resource."""
        match path.strip("/").split("/"):
            case ["apis", group, version, "namespaces", namespace, plural, *rest] if len(rest) <= 2:
                pass
            case _:
                return None
        if (f"{group}/{version}", plural) not in self.api.kinds:
            return None
        name, part = ([*rest, None, None])[:2]
        if part not in (None, "status") or (part == "status" and plural not in WITH_STATUS):
            return None
        verb = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[self.command]
        if verb == "get" and name is None:
            verb = "watch" if query.get("watch") in ("1", "true", "True") else "list"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return Request(verb, f"{group}/{version}", plural, namespace, name, part, query.get("dryRun") == "All", token)

    def _watch(self, request: Request, query: Mapping[str, str]) -> None:
        events = self.api.changes(
            request, int(query.get("resourceVersion") or 0), float(query.get("timeoutSeconds") or 3600)
        )
        first = next(events, None)  # refusals come before the head
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        while True:
            if self.api._outage is not None:
                return
            if first is not None:
                self.wfile.write(json.dumps(first).encode() + b"\n")
                self.wfile.flush()
            try:
                first = next(events)
            except StopIteration:
                return

    def _send(self, status: int, body: Any) -> None:
        self._send_text(status, json.dumps(body), "application/json")

    def _send_text(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        encoded = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _key(request: Request) -> tuple[str, str, str]:
    return request.plural, request.namespace, str(request.name)


def _json(content_type: str, body: bytes) -> Any:
    if content_type not in ("application/json", ""):  # who says nothing means JSON
        raise Refused(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {content_type}")
    try:
        return json.loads(body)
    except ValueError as error:
        raise Refused(400, "BadRequest", f"the object provided is unrecognized: {error}") from None


def _validate(plural: str, given: Object) -> None:
    """Of what the controller writes, as the API server's own validation has it."""
    wrong = []
    if plural == "leases":
        spec = given.get("spec") or {}
        wrong += [key for key in ("acquireTime", "renewTime") if key in spec and not MICRO_TIME.fullmatch(spec[key])]
        if "leaseDurationSeconds" in spec and not spec["leaseDurationSeconds"] > 0:
            wrong.append("spec.leaseDurationSeconds: must be greater than 0")
        if spec.get("leaseTransitions", 0) < 0:
            wrong.append("spec.leaseTransitions: must be greater than or equal to 0")
    if plural == "events":
        if not MICRO_TIME.fullmatch(given.get("eventTime") or ""):
            wrong.append("eventTime")
        wrong += [key for key in ("reportingController", "reportingInstance", "action", "reason") if not given.get(key)]
        wrong += [k for k in ("reportingInstance", "action", "reason") if len(given.get(k) or "") > 128]
        if len((given.get("note") or "").encode()) > 1024:
            wrong.append("note: can have at most 1024 characters")
        if given.get("type") not in ("Normal", "Warning"):
            wrong.append("type")
        regarding = given.get("regarding") or {}
        if regarding.get("namespace") != given["metadata"].get("namespace"):
            wrong.append("regarding.namespace: does not match event.namespace")
    if wrong:
        raise Refused(422, "Invalid", f"{plural} is invalid: {'; '.join(wrong)}")


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


def _json_patched(target: Object, operations: list[Any]) -> Object:
    """RFC 6902, as far as add, replace, remove and test of members go."""
    patched = copy.deepcopy(target)
    for operation in operations:
        try:
            what = operation["op"]
            *path, last = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
            parent = patched
            for step in path:
                parent = parent[step]
            if what in ("add", "replace"):
                if what == "replace" and last not in parent:
                    raise KeyError(last)
                parent[last] = operation["value"]
            elif what == "remove":
                del parent[last]
            elif what != "test" or parent.get(last) != operation["value"]:
                raise Refused(422, "Invalid", f"the operation {operation} cannot be done")
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(422, "Invalid", f"the server rejected our request: {error!r}") from None
    return patched
