"""The environment as frozen, typed settings of serving. By pydantic alone: pydantic-settings costs 0.2 s at start."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, SecretStr, ValidationError

from ml.errors import UserError
from ml.validation import Environment, Holds, bad_environment

Positive = Annotated[int, Field(ge=1)]


class ServeSettings(Environment):
    """Each field is the environment variable of the same name in capitals; an empty variable counts as unset."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: Annotated[int, Field(ge=1, le=64)] = 1  # processes
    model_store: str = "models"  # a folder | git+PATH_OR_URL | mlflow+http(s)://HOST
    model_tag: str | None = None  # the model at start; the store's newest where it is unset
    # of the routes that change the model; unset: they are refused
    serve_token: Annotated[SecretStr | None, Holds("token")] = None
    serve_state: Path | None = None  # folder of the pointer and of downloaded models; unset: a temporary one
    serve_max_body: Positive = 10 * 2**20  # bytes of a request
    serve_max_pixels: Positive = 16 * 2**20  # of one image
    serve_max_images: Positive = 1024  # of one request
    serve_max_model: Positive = 256 * 2**20  # bytes of a model file
    serve_concurrency: Positive = 512  # requests in flight in one worker
    serve_timeout: Annotated[float, Field(gt=0)] = 10.0  # seconds to send a request, and to wait in the queue
    serve_drain: Annotated[float, Field(ge=0, le=600)] = 3.0  # seconds between /ready's 503 and the end
    dvc_remote_url: str | None = None
    mlflow_model_name: str = "ml"
    mlflow_tracking_username: str | None = None
    mlflow_tracking_password: SecretStr | None = None
    mlflow_tracking_token: Annotated[SecretStr | None, Holds("token")] = None
    otel_exporter_otlp_endpoint: str | None = None

    @property
    def token(self) -> str | None:
        return self.serve_token.get_secret_value() if self.serve_token else None


def load_settings() -> ServeSettings:
    """Read the environment. Raises UserError that names each bad variable, never a value: it may be a secret."""
    values = {name: os.environ.get(name.upper(), "") for name in ServeSettings.model_fields}
    try:
        settings = ServeSettings.model_validate({name: value for name, value in values.items() if value})
    except ValidationError as error:
        raise bad_environment(error) from None
    if settings.token is not None and not re.fullmatch(r"[\x21-\x7e]{8,}", settings.token):
        raise UserError(
            "SERVE_TOKEN must have at least 8 characters, all printable ASCII without spaces: a guessable token "
            "lets anybody replace the model. Try: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return settings
