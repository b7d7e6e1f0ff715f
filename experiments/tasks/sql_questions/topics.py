"""The topics of the generated tables: their columns with the values of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Values = Sequence[str] | range


@dataclass(frozen=True)
class Topic:
    """What the rows of a table are.

    Attributes:
      one: A row, in a question.
      key: The column that names the rows; its values differ.
      columns: The values of each column by name: texts, or a range of numbers.
    """

    one: str
    key: str
    columns: Mapping[str, Values]

    @property
    def several(self) -> str:
        """Several rows, in a question."""
        return f"{self.one[:-1]}ies" if self.one.endswith("y") else f"{self.one}s"


_COUNTRIES = ("Peru", "Norway", "Kenya", "Japan", "Canada", "Italy", "Chile", "India", "Poland", "Ghana")
_PEOPLE = ("Ada", "Bruno", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jana", "Kofi", "Lena", "Mara")
_COLORS = ("red", "green", "blue", "black", "white", "yellow", "gray")
_CITIES = ("Lima", "Oslo", "Nairobi", "Osaka", "Ottawa", "Turin", "Arica", "Pune", "Gdansk", "Accra", "Bergen", "Cusco")
_MONTHS = ("January", "March", "April", "June", "August", "October", "December")

TRAIN: dict[str, Topic] = {
    "cities": Topic(
        "city",
        "city",
        {
            "city": _CITIES,
            "country": _COUNTRIES,
            "population": range(20_000, 900_000, 1000),
            "area": range(20, 900),
            "founded": range(1200, 1900),
        },
    ),
    "employees": Topic(
        "employee",
        "name",
        {
            "name": _PEOPLE,
            "department": ("sales", "support", "design", "legal", "research"),
            "salary": range(2000, 9000, 100),
            "age": range(20, 66),
            "office": _CITIES,
        },
    ),
    "books": Topic(
        "book",
        "title",
        {
            "title": ("Salt", "The Long River", "Harbor", "Seven Keys", "North", "Glass", "Old Bridge", "Winter Light"),
            "author": _PEOPLE,
            "genre": ("novel", "poetry", "history", "travel", "science"),
            "pages": range(80, 900),
            "year": range(1950, 2024),
        },
    ),
    "cars": Topic(
        "car",
        "model",
        {
            "model": ("Falcon", "Comet", "Orbit", "Breeze", "Delta", "Lynx", "Nomad", "Pico", "Strada"),
            "color": _COLORS,
            "price": range(9000, 60_000, 500),
            "seats": range(2, 9),
            "top_speed": range(120, 280),
        },
    ),
    "games": Topic(
        "game",
        "opponent",
        {
            "opponent": ("Tigers", "Bears", "Hawks", "Wolves", "Sharks", "Eagles", "Bulls", "Ravens"),
            "venue": ("home", "away", "neutral"),
            "points": range(40, 120),
            "attendance": range(800, 30_000, 100),
            "month": _MONTHS,
        },
    ),
    "courses": Topic(
        "course",
        "course",
        {
            "course": ("Algebra", "Botany", "Logic", "Optics", "Latin", "Drawing", "Statistics", "Ethics"),
            "teacher": _PEOPLE,
            "credits": range(1, 13),
            "students": range(5, 200),
            "room": ("A1", "A2", "B1", "B3", "C7"),
        },
    ),
    "planets": Topic(
        "planet",
        "planet",
        {
            "planet": ("Arda", "Belos", "Cyra", "Doria", "Eron", "Fenn", "Galt", "Hyla"),
            "star": ("Vega", "Altair", "Deneb", "Mira"),
            "moons": range(40),
            "radius": range(1000, 70_000, 100),
            "discovered": range(1780, 2020),
        },
    ),
    "recipes": Topic(
        "recipe",
        "dish",
        {
            "dish": ("lentil soup", "rice pudding", "pancakes", "goulash", "paella", "dumplings", "ratatouille"),
            "origin": _COUNTRIES,
            "minutes": range(10, 180, 5),
            "servings": range(1, 13),
            "course": ("starter", "main", "dessert"),
        },
    ),
    "ships": Topic(
        "ship",
        "ship",
        {
            "ship": ("Aurora", "Borealis", "Coral", "Dolphin", "Endeavor", "Fortuna", "Gannet", "Horizon"),
            "flag": _COUNTRIES,
            "length": range(20, 350),
            "crew": range(4, 900),
            "built": range(1900, 2020),
        },
    ),
    "songs": Topic(
        "song",
        "song",
        {
            "song": ("Blue Morning", "Echo", "Far Away", "Gold", "Hollow", "Island", "Jasmine", "Lanterns"),
            "singer": _PEOPLE,
            "album": ("First Steps", "Night Train", "Roots", "Signals"),
            "seconds": range(90, 500),
            "plays": range(1000, 90_000, 500),
        },
    ),
    "mountains": Topic(
        "mountain",
        "mountain",
        {
            "mountain": ("Acrux", "Bela", "Corvo", "Drago", "Elbrin", "Forca", "Grend", "Hoth"),
            "range": ("Northern Alps", "Coastal Range", "Blue Ridge", "High Sierra"),
            "height": range(900, 7000, 10),
            "first_ascent": range(1800, 1990),
            "climbers": range(400),
        },
    ),
    "orders": Topic(
        "order",
        "customer",
        {
            "customer": _PEOPLE,
            "product": ("lamp", "chair", "desk", "shelf", "carpet", "mirror"),
            "quantity": range(1, 60),
            "total": range(20, 4000, 5),
            "status": ("open", "paid", "shipped", "returned"),
        },
    ),
}
VALIDATION: dict[str, Topic] = {
    "schools": Topic(
        "school",
        "school",
        {
            "school": ("Oak Hill", "Riverside", "Lakeview", "St. Mark", "Central", "Westfield", "Greenwood"),
            "town": _CITIES,
            "pupils": range(60, 1500),
            "teachers": range(5, 120),
            "opened": range(1850, 2015),
        },
    ),
    "films": Topic(
        "film",
        "film",
        {
            "film": ("Ashes", "Bluebird", "Cold Coast", "Drift", "Ember", "Fields", "Gravity Well"),
            "director": _PEOPLE,
            "language": ("English", "Spanish", "Hindi", "Polish", "Japanese"),
            "runtime": range(70, 210),
            "budget": range(100, 9000, 50),
        },
    ),
}
TEST: dict[str, Topic] = {
    "airports": Topic(
        "airport",
        "airport",
        {
            "airport": ("Southgate", "Northfield", "Bayport", "Highland", "Redwood", "Sandhill", "Clearwater"),
            "region": ("coast", "desert", "islands", "valley"),
            "runways": range(1, 8),
            "passengers": range(50_000, 900_000, 5000),
            "elevation": range(2500),
        },
    ),
    "animals": Topic(
        "animal",
        "animal",
        {
            "animal": ("otter", "lynx", "ibex", "tapir", "heron", "gecko", "badger", "puffin", "dingo"),
            "habitat": ("forest", "river", "desert", "tundra", "coast"),
            "weight": range(1, 400),
            "lifespan": range(2, 70),
            "diet": ("plants", "insects", "fish", "meat"),
        },
    ),
    "museums": Topic(
        "museum",
        "museum",
        {
            "museum": ("Glass Hall", "City Archive", "Maritime House", "Tower Gallery", "Rail Depot", "Print Room"),
            "city": _CITIES,
            "visitors": range(4000, 800_000, 1000),
            "rooms": range(3, 90),
            "fee": range(40),
        },
    ),
    "bridges": Topic(
        "bridge",
        "bridge",
        {
            "bridge": ("Iron Span", "Queen's Crossing", "Mill Bridge", "Stone Arch", "Twin Towers", "Ferry Link"),
            "river": ("Arno", "Volta", "Tana", "Biobio", "Glomma"),
            "length": range(40, 4000, 10),
            "lanes": range(1, 9),
            "opened": range(1780, 2020),
        },
    ),
}
