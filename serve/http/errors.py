"""Errors of the HTTP server, in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from ...meshes import ServeError, TrellaxError


class HttpError(ServeError):
    """A request that the server refuses, with the status of its response.

    Args:
        status: the HTTP status, from 400 up.
        param: the field of the request that is wrong.
        code: a word for programs, such as "model_not_found".
    """

    def __init__(
        self,
        problem: str,
        *,
        status: int = 400,
        fix: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(problem, fix=fix)
        self.status, self.param, self.code = status, param, code


def error_body(error: TrellaxError) -> dict[str, Any]:
    """Return the JSON of an error; one that is no `HttpError` is a mistake in the request."""
    message = error.problem if error.fix is None else f"{error.problem} Fix: {error.fix}"
    status = status_of(error)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    own = {"param": error.param, "code": error.code} if isinstance(error, HttpError) else {"param": None, "code": None}
    return {"error": {"message": message, "type": kind, **own}}


def status_of(error: TrellaxError) -> int:
    """Return the HTTP status of an error."""
    return error.status if isinstance(error, HttpError) else 400
