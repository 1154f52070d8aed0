"""One benchmark a file; see README.md."""
