"""The loop that makes the host look like its orders: state and diff decide, apply acts."""
