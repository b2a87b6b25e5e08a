"""The environment as frozen, typed `Settings`: URLs, ids and tokens. Built in main() or create_app(), never at import."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ml.errors import UserError
from ml.validation import Environment, Holds, bad_environment, check_environment

Url = Annotated[str, Field(pattern=r"^https?://[^\s/]+[^\s]*$"), AfterValidator(lambda url: url.rstrip("/"))]
Id = Annotated[int, Field(ge=1)]
Sha = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
Text = Annotated[str | None, Holds("text")]  # what people wrote elsewhere, and GitLab hands on
Token = Annotated[SecretStr | None, Holds("token")]
File = Annotated[Path | None, Holds("file")]  # of a variable of type File

# What other libraries read from the environment themselves.
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_ROLE_ARN",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "SSH_AUTH_SOCK",
)
CREDENTIAL_FILES = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AZURE_FEDERATED_TOKEN_FILE",
)


class Settings(Environment, BaseSettings):
    """Each field is the environment variable of the same name in capitals; an empty variable counts as unset."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    # GitLab: set by GitLab in every job
    ci_api_v4_url: Url | None = None
    ci_server_url: Url | None = None
    ci_project_id: Id | None = None
    ci_project_url: Url | None = None
    ci_server_tls_ca_file: File = None  # set by the runner: the CA of this GitLab
    ci_commit_sha: Sha | None = None
    ci_pipeline_id: Id | None = None
    ci_job_id: Id | None = None
    ci_job_token: Token = None  # reads merge requests and notes, writes neither

    # GitLab: set by GitLab in merge-request pipelines only
    ci_merge_request_iid: Id | None = None
    ci_merge_request_project_id: Id | None = None  # the project that the merge request is to be merged into
    ci_merge_request_project_url: Url | None = None
    ci_merge_request_source_project_id: Id | None = None  # another one when it comes from a fork
    ci_merge_request_diff_base_sha: Sha | None = None  # where the source branch left the target
    ci_merge_request_target_branch_sha: Sha | None = None  # of the target, in HEAD: merged results, trains
    # as they were when the pipeline was created, separated by commas
    ci_merge_request_labels: Annotated[str, Holds("text")] = ""

    # GitLab: what a receipt says of the job
    ci_job_name: Text = None
    ci_job_url: Url | None = None
    gitlab_user_login: Text = None  # who started the job
    ci_job_image: str | None = None
    ci_pipeline_url: Url | None = None
    ci_runner_description: Text = None

    # The DVC remote. docs/remotes.md says which kind needs which
    dvc_remote_url: str | None = None
    dvc_remote_endpoint_url: Url | None = None  # of S3-compatible storage
    dvc_merge_request_remote_url: str | None = None  # else DVC_REMOTE_URL/merge-requests
    dvc_remote_user: str | None = None
    dvc_remote_password: SecretStr | None = None  # with a key file, its passphrase
    dvc_remote_token: Token = None  # WebDAV and HTTP: Authorization: Bearer
    dvc_remote_key_file: File = None  # ssh
    dvc_remote_known_hosts_file: File = None  # ssh
    dvc_remote_http_method: Literal["PUT", "POST"] = "PUT"
    gdrive_service_account_file: File = None
    gdrive_credentials_data: Annotated[SecretStr | None, Holds("line")] = None  # JSON

    # The comment: a project access token, scope api, role Reporter or higher, masked and not protected
    repo_token: Token = None
    gitlab_token: Token = None

    # Release: on the default branch
    ci_default_branch: Annotated[str, Holds("text")] = "main"
    release_token: Token = None  # project access token: api, write_repository, Maintainer; protected
    release_rebuild: bool = False  # train anew and demand what the reviewers saw, to the bit
    release_without_review: bool = False  # release what nobody has seen a comment on
    release_job: str = "pipeline"  # of the merge request's pipeline: has dvc.lock and reports/receipt.json
    release_report_job: str = "report"  # has reports/comment.md and reports/comparison.json

    # Deployment: the image job gives IMAGE, a registry's path with @sha256:…
    image: str | None = None
    previous_image: str | None = None  # the same, to go back to where none is on record
    deploy_command: Annotated[str | None, Holds("command")] = None
    deploy_webhook: Url | None = None
    deploy_webhook_token: Token = None
    deploy_timeout: Annotated[float, Field(gt=0)] = 300.0  # seconds for a deployed model to answer
    serve_url: Url | None = None
    serve_token: Token = None  # of the management routes

    # The report: in place of report.margin of params.yaml, which a merge request can change
    report_margin: Annotated[float, Field(ge=0)] | None = None

    # Training
    # seeds at a time; as many as the machine has room for
    train_processes: Annotated[int, Field(ge=1)] | None = None

    # MLflow
    mlflow_tracking_uri: str = "sqlite:///mlflow.db"
    mlflow_experiment_name: str = "ml"
    mlflow_model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "ml"  # the registered model
    mlflow_run_id: str | None = None  # of the run to write into, as `mlflow run` sets it
    tracking: bool = True  # TRACKING=off: no run is recorded
    tracking_folder: Path = Path(".tracking")  # what the server has not got yet

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
    def baseline(self) -> str | None:
        """The newest commit of the target branch that HEAD contains; zeros where there is none; None: no merge request.

        In a pipeline of merged results and in a merge train HEAD is the merge with the target as it is now, and only
        then CI_MERGE_REQUEST_TARGET_BRANCH_SHA is set; the diff's base is older, and would credit the merge request
        with what others merged since.
        """
        shas = self.ci_merge_request_target_branch_sha, self.ci_merge_request_diff_base_sha
        given = [sha for sha in shas if sha is not None]
        return next((sha for sha in given if sha.strip("0")), given[0] if given else None)

    def require_baseline(self, option: str) -> str:
        """Raises UserError that names `option`, to be used where there is no merge request."""
        if self.baseline is None:
            in_one = self.ci_merge_request_iid is not None
            where = "This merge-request pipeline" if in_one else "This is no merge-request pipeline: it"
            raise UserError(
                f"{where} has neither CI_MERGE_REQUEST_TARGET_BRANCH_SHA nor CI_MERGE_REQUEST_DIFF_BASE_SHA. "
                f"Name the commit to compare with: {option} REV (forty zeros: none)."
            )
        return self.baseline

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
        settings = Settings()
    except ValidationError as error:
        raise bad_environment(error) from None
    check_environment(CREDENTIALS, CREDENTIAL_FILES)
    return settings
