"""What a page says of two models' behaviour: a section for each part of an evaluation."""
