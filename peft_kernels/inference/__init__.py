"""What layers keep from one call to the next in inference, and how they know that it still holds."""
