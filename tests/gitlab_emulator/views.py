"""Objects as the JSON that GitLab answers with; field names from doc/api/*.md."""

from tests.gitlab_emulator.rights import MAINTAINER
from tests.gitlab_emulator.state import Job, Json, MergeRequest, Note, Project, Token, User


def user_json(user: User, base_url: str) -> Json:
    return {
        "id": user.id,
        "username": user.username,
        "name": user.name,
        "state": "active",
        "avatar_url": None,
        "web_url": f"{base_url}/{user.username}",
    }


def project_json(project: Project, base_url: str, token: Token) -> Json:
    """As the token's user sees it; the settings of CI/CD are for Maintainers (API::Entities::Project)."""
    url = f"{base_url}/{project.path}"
    namespace = project.path.rpartition("/")[0]
    settings = {
        "ci_pipeline_variables_minimum_override_role": project.pipeline_variables_role,
        "ci_push_repository_for_job_token_allowed": project.job_token_may_push,
        "ci_config_path": project.ci_config_path,
        "runners_token": None,
    }
    return {
        "id": project.id,
        "name": project.name,
        "path": project.name,
        "path_with_namespace": project.path,
        "default_branch": project.default_branch,
        "visibility": "private",
        "web_url": url,
        "http_url_to_repo": f"{url}.git",
        "ssh_url_to_repo": f"git@{base_url.partition('://')[2]}:{project.path}.git",
        "namespace": {"id": 1, "name": namespace, "path": namespace, "kind": "group", "full_path": namespace},
        "permissions": {
            # API::Entities::ProjectWithAccess: members of the project itself
            "project_access": (
                None
                if token.user.id in project.invited
                else {"access_level": token.access_level, "notification_level": 3}
            ),
            "group_access": None,
        },
        "archived": False,
        "empty_repo": project.repository is None,
        "merge_method": project.merge_method,
        "squash_option": "default_off",
        "issues_enabled": True,
        "issues_access_level": "enabled",
        "merge_requests_enabled": True,
        "merge_requests_access_level": "enabled",
        "repository_access_level": "enabled",
        "builds_access_level": "enabled",
        "packages_enabled": "packages" not in project.features_off,
        "releases_access_level": "disabled" if "releases" in project.features_off else "enabled",
        "container_registry_image_prefix": f"registry.{base_url.partition('://')[2]}/{project.path.lower()}",
        **(settings if token.access_level >= MAINTAINER else {}),
    }


def merge_request_json(merge_request: MergeRequest, project: Project, base_url: str) -> Json:
    return {
        "id": merge_request.id,
        "iid": merge_request.iid,
        "project_id": project.id,
        "title": merge_request.title,
        "description": merge_request.description,
        "state": merge_request.state,
        "created_at": merge_request.created_at,
        "updated_at": merge_request.updated_at,
        "merged_at": merge_request.merged_at,
        "source_branch": merge_request.source_branch,
        "target_branch": merge_request.target_branch,
        "source_project_id": merge_request.source_project_id,
        "target_project_id": project.id,
        "sha": merge_request.sha,
        "merge_commit_sha": merge_request.merge_commit_sha,
        "squash_commit_sha": merge_request.squash_commit_sha,
        "author": user_json(merge_request.author, base_url),
        "draft": merge_request.draft,
        "labels": merge_request.labels,
        "detailed_merge_status": "mergeable",
        "user_notes_count": sum(not note.system for note in merge_request.notes.values()),
        "web_url": f"{base_url}/{project.path}/-/merge_requests/{merge_request.iid}",
    }


def job_json(job: Job, pipeline: Json, project: Project, base_url: str) -> Json:
    archive = {"file_type": "archive", "size": 1, "filename": "artifacts.zip", "file_format": "zip"}
    return {
        "id": job.id,
        "name": job.name,
        "status": job.status,
        **({"failure_reason": job.failure_reason} if job.status == "failed" else {}),
        "ref": pipeline["ref"],
        "tag": False,
        "pipeline": {"id": pipeline["id"], "ref": pipeline["ref"], "status": pipeline["status"]},
        "artifacts": [archive] if job.kept else [],
        "artifacts_expire_at": job.artifacts_expire_at and job.artifacts_expire_at.isoformat(),
        "web_url": f"{base_url}/{project.path}/-/jobs/{job.id}",
    }


def note_json(note: Note, merge_request: MergeRequest, project: Project, base_url: str) -> Json:
    return {
        "id": note.id,
        "type": None,
        "body": note.body,
        "author": user_json(note.author, base_url),
        "created_at": note.created_at,
        "updated_at": note.updated_at,
        "system": note.system,
        "noteable_id": merge_request.id,
        "noteable_type": "MergeRequest",
        "project_id": project.id,
        "noteable_iid": merge_request.iid,
        "resolvable": False,
        "confidential": False,
        "internal": False,
    }
