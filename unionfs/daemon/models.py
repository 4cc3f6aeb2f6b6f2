"""What goes over the wire as JSON: bodies are checked against these, OpenAPI is made from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LayerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$", examples=["base"])]
Text = Annotated[str, Field(max_length=4096)]
Labels = Annotated[dict[Text, Text], Field(max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class NewLayer(Body):
    id: LayerId
    parent: LayerId | Literal[""] = ""
    kind: Literal["active", "view"] = "active"
    labels: Labels = {}
    options: Annotated[dict[Text, Text], Field(max_length=16, description='{"size": "10g"}: a quota')] = {}


class Commit(Body):
    new_id: LayerId
    labels: Labels | None = None


class Relabel(Body):
    labels: Annotated[Labels, Field(description="an empty value deletes the label")]
    replace: bool = False


class LayerInfo(Answer):
    id: str
    parent: str
    kind: Literal["committed", "active", "view"]
    created: Annotated[float, Field(description="seconds since the epoch")]
    updated: float
    labels: dict[str, str]
    size: Annotated[int, Field(description="bytes of its own content, frozen at commit; -1 before")]
    inodes: int
    diff_id: str


class MountInfo(Answer):
    id: str
    path: str
    references: int


class ChangeInfo(Answer):
    path: Annotated[str, Field(description="bytes that are not UTF-8 as lone surrogates U+DC80 to U+DCFF")]
    kind: Annotated[int, Field(description="0 modified, 1 added, 2 deleted")]


class UsageInfo(Answer):
    size: int
    inodes: int


class AppliedInfo(Answer):
    size: int
    diff_id: str


class ImageInfo(Answer):
    name: str
    id: Annotated[str, Field(description="digest of its configuration")]
    layer: Annotated[str, Field(description="the topmost; empty for an image without layers")]
    created: float
    size: Annotated[int, Field(description="bytes of all its layers, shared ones included")]


class StepInfo(Answer):
    created: str
    created_by: str
    comment: str
    size: int
    layer: Annotated[str, Field(description="empty where the step made none")]


class ContainerInfo(Answer):
    id: str
    name: str
    image: str
    config: str
    layer: str
    created: float
    mountpoint: Annotated[str, Field(description="empty while it is not mounted")]


class NewContainer(Body):
    image: Text
    name: Text = ""
    size: Annotated[Text, Field(description="a quota, as 10g, where the driver can")] = ""


class CommitContainer(Body):
    image: Text
    comment: Text = ""


class Retag(Body):
    name: Text


class Version(Answer):
    version: str
    api_version: str
    python: str
    kernel: str
    pid: int
    started: float


class Info(Answer):
    storage_driver: str
    chosen: Annotated[str, Field(description="why it is this driver")]
    data_root: str
    status: Annotated[list[tuple[str, str]], Field(description="the driver's own lines")]
    layers: int
    images: int
    containers: int
    mounts: int
    server_version: str
    kernel_version: str
    architecture: str
    cpus: int
    memory: Annotated[int, Field(description="bytes")]
    listening: list[str]
    warnings: list[str]


class Event(Answer):
    number: int
    time: float
    action: str
    id: str
    attributes: dict[str, str]


class Problem(Answer):
    message: str
