"""How hard the text is: surprisal and entropy, the rules that make a load of them, the meter that follows a text."""
