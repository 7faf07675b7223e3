from pyopt._engine import Rule
from pyopt._matrix import Pass

sgd: Rule
lion: Rule
adagrad: Rule
asgd: Rule
rprop: Rule
adadelta: Rule
rmsprop: Rule
adamax: Rule
adam: Rule
adam_scaled: Rule
adabelief: Rule
radam: Rule
nadam: Rule
adopt: Rule
ademamix: Rule
adan: Rule
ftrl: Rule
sgd_schedule_free: Rule
adamw_schedule_free: Rule
lars: Rule
lamb: Rule
prodigy: Rule
interpolation: Rule
muon: Rule
adafactor: Rule
roof: Rule

squares: Pass
update_squares: Pass
update: Pass
product: Pass
