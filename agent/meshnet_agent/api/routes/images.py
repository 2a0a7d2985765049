"""The API's requests on images (docs/api.md), for `meshnet_agent.containers.images`."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from meshnet.errors import UsageError
from meshnet_agent.api.documents.images import (
    ImageDetails,
    ImageSummary,
    RemovedImage,
    image_details,
    image_summary,
    removed_image,
)
from meshnet_agent.api.operation import Operation, operation

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from meshnet_agent.containers.images import Images


_TAR = "application/x-tar"


class LoadQuery(msgspec.Struct, frozen=True):
    """Parameters of ``POST /v1/images``: the name for an archive that holds none."""

    name: str | None = None


def image_operations(images: Images) -> list[Operation]:
    """The operations on images."""

    def image_of(request: Request) -> str:
        return str(request.path_params["image"])

    async def list_all(_request: Request) -> list[ImageSummary]:
        return list(map(image_summary, await images.all()))

    async def load(request: Request, query: LoadQuery) -> list[ImageSummary]:
        async with aclosing(_chunks(request)) as archive:
            loaded = await images.load(archive, query.name)
        return list(map(image_summary, loaded))

    async def inspect(request: Request) -> ImageDetails:
        return image_details(await images.find(image_of(request)))

    async def remove(request: Request) -> RemovedImage:
        return removed_image(await images.remove(image_of(request)))

    async def export(request: Request) -> Response:
        await images.find(image_of(request))  # for its error: after the headers it is too late
        return _ArchiveResponse(images, image_of(request))

    return [
        operation("GET", "/v1/images", list_all, answer=list[ImageSummary]),
        operation("POST", "/v1/images", load, query=LoadQuery, answer=list[ImageSummary]),
        # Names of images contain slashes.
        operation("GET", "/v1/images/{image:path}", inspect, answer=ImageDetails),
        operation("DELETE", "/v1/images/{image:path}", remove, answer=RemovedImage),
        operation("GET", "/v1/archives/{image:path}", export, answer=None, media=_TAR),
    ]


class _ArchiveResponse(Response):
    """Streams an image as a tar."""

    media_type = _TAR

    def __init__(self, images: Images, image: str) -> None:
        super().__init__()
        del self.headers["content-length"]  # which says 0: the length is known only at the end
        self._images = images
        self._image = image

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        async def write(chunk: bytes) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._images.export(self._image, write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chunks(request: Request) -> AsyncGenerator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise UsageError("the archive broke off while it was sent: send it again") from error
