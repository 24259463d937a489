"""What tests of several rooms share: engines, servers, checkpoints, oracles."""
