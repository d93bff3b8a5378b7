"""A Hub on this machine, for tests and demonstrations without a network.

It is a server that the real ``huggingface_hub`` client, ``timm`` and ``datasets`` talk to::

    with LocalHub() as hub, hub.client(token=hub.write_token):
        huggingface_hub.create_repo("org/model")
        huggingface_hub.upload_folder(repo_id="org/model", folder_path=folder)
        with hub.fault(Fault(kind="cut", path="*/model.safetensors")):
            huggingface_hub.snapshot_download("org/model")  # resumes
        assert "model.safetensors" in hub.files("org/model")
"""

from .access import User
from .faults import Fault, Injection
from .hub import LocalHub
from .repository import Commit, Repository
from .server import Seen

__all__ = ["Commit", "Fault", "Injection", "LocalHub", "Repository", "Seen", "User"]
