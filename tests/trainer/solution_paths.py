"""Short solutions written by hand: per problem two ways to the answer, each told twice. No model wrote them."""

PROBLEMS = {
    "sum of 1 to 100": (
        (
            "Pair the first and the last number: 1 + 100 = 101, 2 + 99 = 101 and so on. There are 50 pairs, so "
            "the sum is 50 * 101 = 5050.",
            "Match numbers from both ends. Each pair adds up to 101 and we have fifty of them; 50 times 101 is 5050.",
        ),
        (
            "Prove by induction that 1 + ... + n = n(n+1)/2. It holds for n = 1. If it holds for n, adding n + "
            "1 gives (n+1)(n+2)/2. For n = 100 this is 5050.",
            "Claim: the sum of the first n integers is n(n+1)/2. Base case n = 1 is clear, and the inductive "
            "step adds n + 1 to both sides. Put n = 100: 100 * 101 / 2 = 5050.",
        ),
    ),
    "larger root of x^2 - 5x + 6 = 0": (
        (
            "Look for factors: two numbers with product 6 and sum 5 are 2 and 3, so (x - 2)(x - 3) = 0. The "
            "larger root is 3.",
            "The polynomial factors as (x - 3)(x - 2) because 2 * 3 = 6 and 2 + 3 = 5. Hence x = 2 or x = 3; take 3.",
        ),
        (
            "By the quadratic formula x = (5 ± sqrt(25 - 24)) / 2 = (5 ± 1) / 2, so the roots are 2 and 3. The "
            "larger is 3.",
            "The discriminant is 25 - 24 = 1. The formula gives (5 + 1)/2 = 3 and (5 - 1)/2 = 2, so the answer is 3.",
        ),
    ),
    "chance of at least one six in two rolls": (
        (
            "The complement is no six at all: (5/6)^2 = 25/36. So the chance of at least one is 1 - 25/36 = 11/36.",
            "It is easier to count the failures. Both dice miss with probability 5/6 * 5/6 = 25/36, which "
            "leaves 11/36.",
        ),
        (
            "List the 36 outcomes. The first die is six in 6 of them, the second in 6, both in 1, so 6 + 6 - 1 "
            "= 11 have a six: 11/36.",
            "By inclusion and exclusion: 1/6 + 1/6 - 1/36 = 11/36, adding the chances of each die and removing "
            "the overlap.",
        ),
    ),
    "area of the triangle (0,0), (4,0), (1,3)": (
        (
            "Take the base on the x-axis. Its length is 4 and the height is the y-coordinate 3, so the area is "
            "4 * 3 / 2 = 6.",
            "The side from (0,0) to (4,0) is 4 long; the third corner lies 3 above it. Half of base times height is 6.",
        ),
        (
            "Use the shoelace formula: |0*(0-3) + 4*(3-0) + 1*(0-0)| / 2 = 12 / 2 = 6.",
            "The determinant of the vectors (4,0) and (1,3) is 4*3 - 0*1 = 12. Half of its absolute value is "
            "the area, 6.",
        ),
    ),
    "remainder of 7^100 by 6": (
        (
            "Since 7 = 1 mod 6, every power of 7 is 1 mod 6. The remainder is 1.",
            "Modulo 6 the number 7 is congruent to 1, and 1^100 = 1, so the remainder is 1.",
        ),
        (
            "Write 7 = 6 + 1 and expand (6 + 1)^100 by the binomial theorem: every term but the last has a "
            "factor 6. What is left is 1.",
            "Expanding (1 + 6)^100, all terms with a positive power of 6 vanish in the division by 6; the "
            "constant term is 1.",
        ),
    ),
    "maximum of x(10 - x)": (
        (
            "The derivative is 10 - 2x, zero at x = 5, and the second derivative is -2, so this is a maximum: 25.",
            "Set f'(x) = 10 - 2x = 0. Then x = 5, f'' < 0, and f(5) = 25.",
        ),
        (
            "Complete the square: x(10 - x) = 25 - (x - 5)^2, which is at most 25.",
            "By the inequality of the means the product of two numbers with sum 10 is at most (10/2)^2 = 25, "
            "with equality at x = 5.",
        ),
    ),
}
