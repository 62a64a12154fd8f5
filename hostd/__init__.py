"""The daemon of one bare-metal host: runs sandboxes as the scheduler assigns them and says truthfully how they are."""
