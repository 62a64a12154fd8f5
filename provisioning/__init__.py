"""Builds images: Debian packages in, a content-addressed bootable artifact out. Knows no other program."""
