"""Texts of many kinds, on which the inputs of a model's linears are measured."""

CALIBRATION_TEXTS = (
    "When does the ferry to the island leave on Sundays?",
    "The council approved a new cycle path along the canal. Work begins in April and should be "
    "finished before the summer holidays, according to the city's engineer.",
    "for index, value in enumerate(prices):\n    if value > limit:\n        print(index, value)",
    "Whisk the eggs with the sugar until pale, fold in the flour, and bake at 180 degrees for "
    "twenty-five minutes.",
    "What causes the northern lights, and where are they seen best?",
    "Net income for the third quarter was 41.7 million, compared with 38.2 million a year ago.",
    "Der Zug nach Leipzig fährt heute von Gleis sieben ab und hat zehn Minuten Verspätung.",
    "The patient reported mild headaches over two weeks; blood pressure was 135 over 85, and no "
    "other symptoms were noted.",
    "A prime number has no divisors other than one and itself.",
    "My grandmother kept her recipes in a biscuit tin, written on the backs of old envelopes.",
    "SELECT city, avg(temperature) FROM weather WHERE year = 2019 GROUP BY city;",
    "Can I return a jacket without the receipt?",
    "Les élèves préparent une exposition sur les rivières de la région.",
    "The treaty was signed in 1648 and ended thirty years of war in central Europe.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen with the energy of light.",
    "Please find attached the minutes of Tuesday's meeting and the list of open tasks.",
    "How do I change the language of my keyboard?",
    "The engine failed to start because a fuse had blown; after replacing it, the mechanic tested "
    "the battery and the alternator as well.",
    "Tomorrow: cloudy in the north, dry in the south, with a light wind from the west.",
    "La biblioteca abre a las nueve y cierra a las ocho, excepto los domingos.",
    "He climbed the last steps slowly, opened the door of the tower, and saw the whole bay below.",
    "Which vitamins are found in carrots?",
    "function add(a, b) { return a + b; } // used by the checkout page",
    "An octopus has three hearts, two of which pump blood through the gills.",
    "The court held that the contract was void, since neither party had agreed on a price.",
    "I would recommend this hotel for the quiet rooms, but not for the breakfast.",
    "Explain the difference between weather and climate in simple words.",
    '{"name": "sensor-12", "unit": "lux", "values": [412, 398, 405]}',
    "Gravity bends light: stars near the rim of the eclipsed sun appear slightly displaced.",
    "The orchestra tuned, the lights went down, and someone in the third row began to cough.",
    "Mix one part cement with three parts sand, add water slowly, and use the mortar within an "
    "hour.",
    "Who wrote the music for the film, and was it nominated for a prize?",
    "图书馆星期一不开门。",
    "The company will replace defective parts free of charge for two years from the date of "
    "purchase.",
    "A haiku has three lines of five, seven and five syllables.",
    "Turn left at the church, follow the river for a kilometre, and cross the second bridge.",
    "Rates of infection fell by a third after the wells had been covered.",
    "error: cannot open file 'config.yaml': permission denied",
    "Sparrows, finches and thrushes visit the garden more often when it has snowed.",
    "Why do onions make people cry, and what helps against it?",
)
