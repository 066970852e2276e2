"""Images: packed into EROFS, cut into chunks, stacked in layers, started before they have been fetched."""

from __future__ import annotations

from pathlib import Path


async def lowers(home: Path, image: str) -> list[Path]:
    """The folders of an image, top first, for the lower side of an overlay; made, fetched or mounted if need be.

    NotFound if there is no such image, ImageError if it cannot be built, verified or mounted.
    """
    import asyncio  # here: the process that loads a layer on demand imports this package, and shall start at once

    from dsec.errors import ImageError
    from dsec.images.debian import ensure
    from dsec.images.layers import Images

    def work() -> list[Path]:
        images = Images(home)
        try:
            ensure(images, image)
            return images.mount(image)
        except OSError as problem:
            raise ImageError(f"image {image!r}: {problem}") from problem

    return await asyncio.to_thread(work)


async def digest(home: Path, image: str) -> str:
    """What an image contains, in 64 hexadecimal digits: for the keys of a trajectory."""
    import asyncio

    from dsec.images.layers import Images

    return await asyncio.to_thread(lambda: Images(home).get(image).digest)
