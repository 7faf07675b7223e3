from pyopt._engine import Rule

sgd: Rule
lion: Rule
adagrad: Rule
rmsprop: Rule
adam: Rule
roof: Rule
