"""From records to token rows with loss masks, and the order in which ranks see them."""
