"""Disks and what is on them: verified images, sources as EROFS, scratch disks. The only driver that runs mkfs."""

from hostd.drivers.image.images import ImageStore
from hostd.drivers.image.scratch import ScratchDisks
from hostd.drivers.image.sources import SourceStore

__all__ = ["ImageStore", "ScratchDisks", "SourceStore"]
