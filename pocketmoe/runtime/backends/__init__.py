"""How one expert is held and computed: slots, or sessions."""
