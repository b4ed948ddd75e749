"""How hard the text is: surprisal and entropy, the controllers that make a load of them, the meter that follows a text."""
