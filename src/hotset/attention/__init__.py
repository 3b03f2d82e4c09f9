"""What layers attend to, and the backends that compute it."""
