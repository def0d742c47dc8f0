"""What a profile says elsewhere: on another machine, of a related model, at other budgets and prices."""
