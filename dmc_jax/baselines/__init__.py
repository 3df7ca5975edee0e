"""What DMC is compared with."""
