"""What the tests of alerts share: a world to try them in, and the cases."""
