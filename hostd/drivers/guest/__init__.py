"""The host's side of the guest links (docs/guest-link.md)."""

from hostd.drivers.guest.link import SocketLinks

__all__ = ["SocketLinks"]
