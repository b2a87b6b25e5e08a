"""GitLab's API v4 in memory, for tests and for rehearsing the pipeline: see server.GitLabEmulator."""

from tests.gitlab_emulator.server import GitLabEmulator

__all__ = ["GitLabEmulator"]
