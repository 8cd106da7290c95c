"""What machines can do: device profiles, the roofline of this one, and what fits where."""
