"""Configs: `default`, `source` and `exam` make one, `validate` checks it."""

from mixcpt_jax.config.budgets import lost as lost
from mixcpt_jax.config.defaults import OBJECTIVES as OBJECTIVES
from mixcpt_jax.config.defaults import REMAT as REMAT
from mixcpt_jax.config.defaults import add_entry as add_entry
from mixcpt_jax.config.defaults import all_sources as all_sources
from mixcpt_jax.config.defaults import check_variant as check_variant
from mixcpt_jax.config.defaults import default as default
from mixcpt_jax.config.defaults import exam as exam
from mixcpt_jax.config.defaults import has_other_teacher as has_other_teacher
from mixcpt_jax.config.defaults import measure_general as measure_general
from mixcpt_jax.config.defaults import needs_teacher as needs_teacher
from mixcpt_jax.config.defaults import objective_weights as objective_weights
from mixcpt_jax.config.defaults import source as source
from mixcpt_jax.config.defaults import uses_teacher as uses_teacher
from mixcpt_jax.config.defaults import warmup_steps as warmup_steps
from mixcpt_jax.config.phases import changed as changed
from mixcpt_jax.config.phases import check_stored as check_stored
from mixcpt_jax.config.phases import first_difference as first_difference
from mixcpt_jax.config.phases import for_phase as for_phase
from mixcpt_jax.config.phases import resolve_phases as resolve_phases
from mixcpt_jax.config.settings import check_key as check_key
from mixcpt_jax.config.validation import check_schedule as check_schedule
from mixcpt_jax.config.validation import check_values as check_values
from mixcpt_jax.config.validation import frozen_dtype as frozen_dtype
from mixcpt_jax.config.validation import validate as validate
