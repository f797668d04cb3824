"""The fault matrix: what may happen to a run, what must come of it, and which tests make it happen.

A row without tests says why: `here` cannot be injected on one machine without a GPU, or has nothing
to injure in this design; `open` has no test yet.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINING = "tests/training/test_faults.py::"
STATE = "tests/training/test_state.py::"
DRIVEN = "tests/launch/test_training_faults.py::"
DRIVER = "tests/launch/test_training_driver.py::"
RUN = "tests/launch/test_end_to_end.py::"
STORE = "tests/launch/test_store.py::"
CLUSTER = "tests/launch/elsewhere/test_ray_cluster.py::"
SUBMISSION = "tests/launch/elsewhere/test_submission.py::"
NODES = "tests/launch/elsewhere/test_node_faults.py::"
SEARCH = "tests/launch/search/test_search_runs.py::"
ENDPOINT = "tests/evaluation/engines/test_endpoint.py::"
WANDB = "tests/launch/tracking/test_wandb_server.py::"
OFFLINE = "tests/launch/tracking/test_offline.py::"
REFUSALS = "tests/launch/test_refusals.py::"
LOADERS = "tests/evaluation/tasks/test_loaders.py::"


@dataclass(kw_only=True, frozen=True)
class Row:
    """One fault. tests: node ids without parameters; reason: why there are none.

    runs: how often each test runs; how long recovery takes wants several.
    """

    number: int
    fault: str
    expected: str
    tests: tuple[str, ...] = ()
    reason: str = ""
    runs: int = 1


ROWS = (
    Row(
        number=1,
        fault="a worker is killed in mid-step",
        expected="resumed, losses and weights equal, at most 2 steps redone, 30 s",
        tests=(
            f"{DRIVEN}test_a_worker_killed_in_mid_step",
            f"{DRIVEN}test_a_killed_worker_is_back_within_30_seconds",
            f"{DRIVEN}test_one_of_two_workers_killed_in_mid_step",
            f"{TRAINING}test_a_killed_training_goes_on_exactly_in_every_stage",
        ),
    ),
    Row(
        number=2,
        fault="a worker is killed at every start",
        expected="a bounded number of attempts; the message names worker and attempt",
        tests=(f"{DRIVEN}test_a_worker_killed_at_every_start",),
    ),
    Row(
        number=3,
        fault="a rank is killed inside a checkpoint write",
        expected="the state before is taken: 3 points x 3 stages x each rank",
        tests=(f"{TRAINING}test_killed_inside_a_save",),
    ),
    Row(
        number=4,
        fault="killed at each point of the commit protocol",
        expected="the old state or the new one, nothing between",
        tests=(
            f"{STATE}test_killed_over_an_older_directory",
            f"{STATE}test_killed_in_a_first_commit",
        ),
    ),
    Row(
        number=5,
        fault="a shard is cut",
        expected="found, the older state is used",
        tests=(f"{STATE}test_cut_files_are_found", f"{TRAINING}test_damaged_states"),
    ),
    Row(
        number=6,
        fault="a byte is flipped",
        expected="50 of 50 found",
        tests=(f"{STATE}test_fifty_of_fifty_flipped_bytes_are_found",),
    ),
    Row(
        number=7,
        fault="Ray Train's own notes are cut, emptied, or of another version",
        expected="not read: own states count, records and weights equal",
        tests=(f"{DRIVEN}test_damaged_notes_of_ray_train_change_nothing",),
    ),
    Row(
        number=8,
        fault="a file `latest` names a state that is not there",
        expected="not read: manifests alone count",
        tests=(f"{STATE}test_a_file_called_latest_decides_nothing",),
    ),
    Row(
        number=9,
        fault="all states are damaged",
        expected="a clear stop, never a silent fresh start",
        tests=(f"{TRAINING}test_damaged_states",),
    ),
    Row(
        number=10,
        fault="the disk is full when a checkpoint is written",
        expected="the older one is kept, the message has the bytes",
        tests=(f"{TRAINING}test_a_full_disk", f"{DRIVEN}test_a_disk_that_is_full"),
    ),
    Row(
        number=11,
        fault="the disk is full below W&B's files",
        expected="a warning, the run is whole",
        tests=(
            "tests/launch/tracking/test_full_disk.py::"
            "test_a_full_disk_for_the_mirror_loses_nothing_else",
        ),
    ),
    Row(
        number=12,
        fault="the storage path is missing or cannot be written",
        expected="refused by its key before anything starts",
        tests=(
            f"{REFUSALS}test_preflight_refuses_by_key",
            f"{REFUSALS}test_a_read_only_place_is_refused_before_ray_is_imported",
            f"{CLUSTER}test_an_address_or_storage_that_no_run_can_use_is_refused",
        ),
    ),
    Row(
        number=13,
        fault="a node dies",
        expected="the training goes on on the others",
        tests=(f"{SUBMISSION}test_a_detached_training_outlives_its_terminal_and_a_node",),
    ),
    Row(
        number=14,
        fault="a node cannot be reached any more",
        expected="taken for dead, one writer only, each step once",
        tests=(f"{NODES}test_a_node_that_is_cut_off_for_good",),
    ),
    Row(
        number=15,
        fault="a partition heals after 5 s",
        expected="at most one restart, never two groups, losses equal",
        tests=(f"{NODES}test_a_link_that_heals_after_five_seconds",),
    ),
    Row(
        number=16,
        fault="planned preemption",
        expected="the state is saved, no step is lost",
        tests=(
            f"{DRIVEN}test_sigterm_to_a_single_worker",
            "tests/launch/elsewhere/test_slurm.py::test_before_the_limit_it_saves_and_queues_itself_again",
        ),
    ),
    Row(
        number=17,
        fault="fewer workers afterwards",
        expected="the same global batch, losses within 1e-5",
        tests=(
            f"{DRIVEN}test_stopped_with_two_workers_and_resumed_with_one",
            f"{TRAINING}test_a_stop_saves_and_the_number_of_workers_may_change",
            f"{CLUSTER}test_a_training_goes_on_with_what_is_left",
        ),
    ),
    Row(
        number=18,
        fault="the head node dies",
        expected="the same command on a new cluster goes on, each step once",
        tests=(f"{NODES}test_a_head_that_dies",),
    ),
    Row(
        number=19,
        fault="the driver is killed",
        expected="no process is left; the same command goes on, the bill is whole",
        tests=(
            f"{RUN}test_a_killed_driver_loses_nothing_and_leaves_no_process",
            f"{DRIVER}test_a_driver_killed_in_mid_training_goes_on_from_the_state",
            "tests/launch/test_ledger_and_hook.py::test_random_runs_bill_what_the_hook_counts",
        ),
    ),
    Row(
        number=20,
        fault="a submitted run is stopped",
        expected="the state is saved; the same command goes on",
        tests=(f"{SUBMISSION}test_a_repeated_submission_attaches_and_a_stopped_one_goes_on",),
    ),
    Row(
        number=21,
        fault="Ctrl-C",
        expected="130, the state is saved, the command that goes on is told",
        tests=(
            f"{RUN}test_ctrl_c_ends_with_130_says_how_to_go_on_and_leaves_no_process",
            f"{DRIVER}test_ctrl_c_saves_and_stops_with_130_and_the_second_would_end_at_once",
            f"{DRIVER}test_two_hard_interrupts_end_at_once_and_cost_only_steps",
        ),
    ),
    Row(
        number=22,
        fault="the same run is submitted twice",
        expected="one run, the second attaches",
        tests=(f"{SUBMISSION}test_a_repeated_submission_attaches_and_a_stopped_one_goes_on",),
    ),
    Row(
        number=23,
        fault="more workers than devices",
        expected="refused before anything starts",
        tests=(
            f"{CLUSTER}test_more_than_there_is_is_refused",
            f"{REFUSALS}test_preflight_refuses_by_key",
        ),
    ),
    Row(
        number=24,
        fault="a node is lost between the checks and the start",
        expected="a finite wait, then the training starts on what is left",
        tests=(f"{NODES}test_a_node_that_dies_before_the_training_starts",),
    ),
    Row(
        number=25,
        fault="a rank hangs",
        expected="noticed by the collective timeout, resumed, losses equal",
        tests=(
            f"{DRIVEN}test_a_hung_worker_ends_by_the_collective_timeout",
            f"{TRAINING}test_a_hung_worker_ends_the_attempt",
        ),
    ),
    Row(
        number=26,
        fault="a rank does not come to a collective",
        expected="the others end by the timeout and name the step, on ZeRO 0 to 3",
        tests=(f"{TRAINING}test_a_worker_that_does_not_come_to_a_collective_ends_the_attempt",),
    ),
    Row(
        number=27,
        fault="a loss or gradient is not finite",
        expected="stopped, never saved",
        tests=(
            f"{TRAINING}test_gradients_that_are_not_numbers_are_never_saved",
            f"{DRIVEN}test_a_loss_that_is_not_finite_is_not_tried_again",
        ),
    ),
    Row(
        number=28,
        fault="one rank runs out of memory",
        expected="all halve the pass, the global batch stays, losses equal",
        tests=(
            f"{TRAINING}test_out_of_memory_halves_the_passes_of_all_workers",
            f"{TRAINING}test_out_of_memory_with_one_row_is_the_end",
            f"{TRAINING}test_out_of_memory_between_collectives_starts_again_with_smaller_passes",
        ),
    ),
    Row(
        number=29,
        fault="the machine runs out of memory",
        expected="the worker is ended and started again, records equal",
        tests=(
            "tests/launch/test_memory_pressure.py::"
            "test_a_worker_ended_for_its_memory_is_started_again",
        ),
    ),
    Row(
        number=30,
        fault="the W&B server cannot be reached at the start",
        expected="waited for once, 10 s; exit code 0, all rows can be sent later",
        tests=(f"{WANDB}test_a_server_that_is_not_there_from_the_start",),
    ),
    Row(
        number=31,
        fault="the W&B server dies, hangs, comes back",
        expected="no stall, no row is lost",
        tests=(f"{WANDB}test_a_server_that_goes_away_loses_no_row",),
    ),
    Row(
        number=32,
        fault="the driver is killed while W&B is offline",
        expected="every finished step is recorded, at most a second of curves is lost, "
        "the next file is whole",
        tests=(f"{OFFLINE}test_a_killed_driver_loses_a_second_of_curves_and_no_step",),
    ),
    Row(
        number=33,
        fault="no key and no network",
        expected="offline, with one line of notice",
        tests=(f"{OFFLINE}test_without_key_and_network_a_run_is_whole_and_says_so_once",),
    ),
    Row(
        number=34,
        fault="an endpoint answers 429, 500, resets or slowly",
        expected="all are answered, attempts bounded, Retry-After kept",
        tests=(
            f"{ENDPOINT}test_every_request_is_answered_under_faults",
            f"{ENDPOINT}test_attempts_are_bounded",
            f"{ENDPOINT}test_retry_after_is_obeyed",
            f"{ENDPOINT}test_limits_of_rate_and_concurrency",
        ),
    ),
    Row(
        number=35,
        fault="an endpoint answers 400, 401 or quota",
        expected="not asked again, never scored as wrong",
        tests=(
            f"{ENDPOINT}test_what_no_waiting_mends_ends_the_job_at_once",
            f"{ENDPOINT}test_a_bad_request_is_one_failed_item_that_is_asked_once",
        ),
    ),
    Row(
        number=36,
        fault="killed among paid requests, 20 times",
        expected="no stored answer is paid for twice",
        tests=(f"{ENDPOINT}test_nothing_stored_is_paid_twice_over_20_kills",),
    ),
    Row(
        number=37,
        fault="the ceiling of cost is near",
        expected="never passed, with 16 workers",
        tests=(
            f"{ENDPOINT}test_the_ceiling_is_never_passed_with_16_workers",
            f"{ENDPOINT}test_processes_share_a_ceiling",
        ),
    ),
    Row(
        number=38,
        fault="an endpoint answers rubbish",
        expected="counted as unread, wrong and of no format; read anew without a "
        "request; a broken line in the store costs no other answer",
        tests=(
            "tests/evaluation/engines/test_endpoint_jobs.py::"
            "test_answers_that_name_no_label_are_counted_and_read_anew_without_a_request",
            f"{ENDPOINT}test_a_broken_line_costs_no_other",
        ),
    ),
    Row(
        number=39,
        fault="an engine process dies in an evaluation",
        expected="its items are asked again, no row twice",
        tests=(
            "tests/launch/test_sharded_engine.py::"
            "test_a_process_killed_within_its_shard_loses_nothing_and_repeats_nothing",
            "tests/launch/test_sharded_engine.py::"
            "test_what_kills_its_process_every_time_fails_the_job_with_the_reason",
        ),
    ),
    Row(
        number=40,
        fault="the driver of a search is killed",
        expected="no rung is lost, the same decisions",
        tests=(
            f"{SEARCH}test_a_killed_driver_loses_no_rung_and_decides_alike",
            f"{SEARCH}test_a_killed_worker_is_tried_again_and_decides_alike",
            "tests/launch/search/test_leg_search_runs.py::"
            "test_a_killed_driver_runs_what_is_missing_and_decides_alike",
        ),
    ),
    Row(
        number=41,
        fault="one run of several, or one arm, fails",
        expected="a row with its reason, the others are whole",
        tests=(
            "tests/launch/test_multirun_runs.py::"
            "test_a_run_that_fails_is_a_row_and_the_others_are_whole",
            f"{RUN}test_a_failing_arm_is_a_failed_row_and_the_others_are_reported",
        ),
    ),
    Row(
        number=42,
        fault="every field of the configuration is mutated",
        expected="refused with key and suggestion",
        tests=(
            "tests/conf/test_mutations.py::test_wrong_type_is_refused",
            "tests/conf/test_mutations.py::test_nan_and_infinity_are_refused",
            "tests/conf/test_mutations.py::test_wrong_sign_is_refused",
            "tests/conf/test_mutations.py::test_unknown_sibling_is_refused_also_with_plus",
        ),
    ),
    Row(
        number=43,
        fault="combinations that cannot run",
        expected="refused before a model is loaded",
        tests=(
            f"{REFUSALS}test_the_command_refuses",
            f"{REFUSALS}test_preflight_refuses_by_key",
            f"{REFUSALS}test_a_lora_target_that_does_not_exist_is_refused_from_the_headers",
        ),
    ),
    Row(
        number=44,
        fault="bad data",
        expected="refused with file and line",
        tests=(f"{LOADERS}test_bad_file", f"{LOADERS}test_overlap_between_files_is_counted"),
    ),
    Row(
        number=45,
        fault="a model folder that would run code",
        expected="nothing runs",
        tests=(
            f"{REFUSALS}test_a_model_that_wants_remote_code_is_refused",
            f"{REFUSALS}test_a_pickled_checkpoint_is_refused",
            "tests/evaluation/models/test_models.py::test_refusals_in_milliseconds",
        ),
    ),
    Row(
        number=46,
        fault="a template that would run code, or for ever",
        expected="refused in bounded time and memory",
        tests=(
            "tests/evaluation/prompts/test_rendering.py::"
            "test_hostile_templates_are_refused_in_bounded_time",
            "tests/evaluation/prompts/test_user_prompt.py::"
            "test_hostile_templates_are_refused_at_once",
        ),
    ),
    Row(
        number=47,
        fault="a checkpoint that would run code",
        expected="nothing runs; the payload is shown to work elsewhere",
        tests=(
            "tests/launch/test_hostile_checkpoints.py::test_a_hostile_checkpoint_runs_nothing",
            "tests/launch/test_hostile_checkpoints.py::test_the_payload_would_have_run",
        ),
    ),
    Row(
        number=48,
        fault="names that lead out of the run's directory",
        expected="refused, nothing is written there",
        tests=(
            "tests/launch/test_path_escapes.py::test_a_name_that_leads_out_is_refused",
            "tests/launch/test_path_escapes.py::"
            "test_no_name_in_an_archive_leads_out_of_where_it_is_unpacked",
        ),
    ),
    Row(
        number=49,
        fault="secrets in environment, files and overrides",
        expected="nowhere in files or on the terminal",
        tests=(
            "tests/launch/logs/test_secrets_nowhere.py::"
            "test_no_secret_is_in_any_file_or_on_the_terminal",
            "tests/launch/elsewhere/test_archive.py::test_no_secret_is_in_the_archive",
        ),
    ),
    Row(
        number=50,
        fault="a client without the token",
        expected="refused on every route",
        tests=(
            "tests/launch/test_dashboard_routes.py::"
            "test_no_route_but_the_public_ones_answers_without_the_token",
            "tests/launch/test_dashboard_routes.py::test_with_the_token_they_answer",
        ),
    ),
    Row(
        number=51,
        fault="two writers of one run",
        expected="the second is refused, a dead one's lock is taken over",
        tests=(f"{STORE}test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for",),
    ),
    Row(
        number=52,
        fault="no GPU, no compiler",
        expected="the CPU path trains, with no compiler on PATH; triton is refused by name",
        tests=(
            "tests/training/test_train_loop.py::test_full_learns_seven_classes",
            f"{REFUSALS}test_preflight_refuses_by_key",
        ),
    ),
    Row(
        number=53,
        fault="another version on one node",
        expected="refused before the first step, with both",
        tests=(
            f"{NODES}test_a_node_with_another_version_is_refused",
            f"{CLUSTER}test_another_version_on_one_node_is_refused_with_both",
        ),
    ),
    Row(
        number=54,
        fault="random kills of workers, engines and drivers",
        expected="final loss, weights, answers and bill as undisturbed, no record "
        "twice, no process left",
        tests=(
            "tests/faults/test_chaos.py::"
            "test_runs_that_are_killed_at_random_leave_what_undisturbed_ones_do",
        ),
    ),
)
