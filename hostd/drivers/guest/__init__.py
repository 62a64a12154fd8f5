"""The host's side of the guest links (docs/guest-link.md)."""

from hostd.drivers.guest.link import Pace, SocketLinks

__all__ = ["Pace", "SocketLinks"]
