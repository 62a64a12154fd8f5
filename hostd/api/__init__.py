"""What hostd serves: output, artifacts and sources, to the scheduler that relays them and to other hosts."""
