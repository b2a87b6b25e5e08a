"""The environment as frozen, typed `Settings`: URLs, ids and tokens. Built in main() or create_app(), never at import."""

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ml.errors import UserError

Url = Annotated[str, Field(pattern=r"^https?://[^\s/]+[^\s]*$"), AfterValidator(lambda url: url.rstrip("/"))]
Id = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Each field is the environment variable of the same name in capitals; an empty variable counts as unset."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    # GitLab: set by GitLab in every job
    ci_api_v4_url: Url | None = None
    ci_server_url: Url | None = None
    ci_project_id: Id | None = None
    ci_project_url: Url | None = None
    ci_commit_sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    ci_pipeline_id: Id | None = None
    ci_job_id: Id | None = None
    ci_job_token: SecretStr | None = None  # reads merge requests and notes, writes neither

    # GitLab: set by GitLab in merge-request pipelines only
    ci_merge_request_iid: Id | None = None
    ci_merge_request_project_id: Id | None = None  # the project that the merge request is to be merged into
    ci_merge_request_project_url: Url | None = None
    ci_merge_request_source_project_id: Id | None = None  # another one when it comes from a fork

    ci_merge_request_labels: str = ""  # as they were when the pipeline was created, separated by commas

    # The comment: a project access token, scope api, role Reporter or higher, masked and not protected
    repo_token: SecretStr | None = None
    gitlab_token: SecretStr | None = None

    # Training
    train_processes: Annotated[int, Field(ge=1)] | None = (
        None  # seeds at a time; as many as the machine has room for
    )

    # MLflow
    mlflow_tracking_uri: str = "sqlite:///mlflow.db"
    mlflow_experiment_name: str = "ml"

    @property
    def comment_token(self) -> SecretStr | None:
        """REPO_TOKEN, else GITLAB_TOKEN: the names and the order that CML uses."""
        return self.repo_token or self.gitlab_token

    @property
    def api_url(self) -> str | None:
        """Where the API v4 is, from CI_API_V4_URL, else CI_SERVER_URL."""
        if self.ci_api_v4_url is None and self.ci_server_url is not None:
            return f"{self.ci_server_url}/api/v4"
        return self.ci_api_v4_url

    @property
    def labels(self) -> list[str]:
        return [label.strip() for label in self.ci_merge_request_labels.split(",") if label.strip()]

    @property
    def from_fork(self) -> bool:
        source, target = self.ci_merge_request_source_project_id, self.merge_request_project_id
        return source is not None and target is not None and source != target

    @property
    def merge_request_project_id(self) -> int | None:
        return self.ci_merge_request_project_id or self.ci_project_id


def load_settings() -> Settings:
    """Read the environment. Raises UserError that names each bad variable, never a value: it may be a secret."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"  {str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors()]
        raise UserError(
            "The environment has bad variables; correct or unset them:\n" + "\n".join(lines)
        ) from None
