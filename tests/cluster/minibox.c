/* A stand-in for Pyxis in tests: a SPANK plugin that runs the tasks of a step inside a root file system.
 *
 * In: the options of srun below, named and meant as Pyxis does; an image is a folder that holds a root file system. Out: each
 * task has mounts of its own, with the image as its root, what it writes there thrown away at its end. An image may hold
 *
 *   /etc/berth-image-binds   a path a line: what the image has of the host, read-only (an image for tests need not be 5 GB)
 *   /etc/berth-image-env     NAME=VALUE a line: the image's environment, stronger than the host's but for --container-env
 *
 * Not as in Pyxis: no registries and squashfs files, tasks of a node do not share what they write, a named container is the
 * memory of which image it has, for the other steps of the job on this node. Only root starts tasks that may mount.
 *
 * plugstack.conf:  required /path/minibox.so FOLDER     FOLDER/root is the place to mount at, FOLDER/names remembers names
 * build:           gcc -shared -fPIC -o minibox.so minibox.c      against the headers of the same release of Slurm
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pwd.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(minibox, 1);

#define BINDS "/etc/berth-image-binds"
#define ENVIRONMENT "/etc/berth-image-env"

enum { IMAGE, MOUNTS, WORKDIR, NAME, ENV, HOME, READONLY, REMAP, COUNT };
#define UNSET 100 /* added to the number of a switch: the option that turns it off */

static char *given[COUNT]; /* what the user asked for; "" for a switch that is on */
static const char *folder;

static int take(int option, const char *text, int remote)
{
	(void)remote;
	char **place = &given[option % UNSET];
	free(*place);
	*place = option >= UNSET ? NULL : strdup(text ? text : "");
	return 0;
}

static struct spank_option options[] = {
	{"container-image", "PATH", "[minibox] root file system to run the tasks in", 1, IMAGE, take},
	{"container-mounts", "SRC:DST[:FLAGS],...", "[minibox] bind mounts; flags are joined by '+'", 1, MOUNTS, take},
	{"container-workdir", "PATH", "[minibox] working directory inside (default: /)", 1, WORKDIR, take},
	{"container-name", "NAME", "[minibox] name for other steps of the job", 1, NAME, take},
	{"container-env", "NAME,...", "[minibox] variables of the host that win over the image's", 1, ENV, take},
	{"container-mount-home", NULL, "[minibox] mount the home directory", 0, HOME, take},
	{"no-container-mount-home", NULL, "[minibox] do not (default)", 0, HOME + UNSET, take},
	{"container-readonly", NULL, "[minibox] the root file system cannot be written", 0, READONLY, take},
	{"container-writable", NULL, "[minibox] it can (default)", 0, READONLY + UNSET, take},
	{"container-remap-root", NULL, "[minibox] accepted; tasks of root are root", 0, REMAP, take},
	{"no-container-remap-root", NULL, "[minibox] accepted", 0, REMAP + UNSET, take},
	SPANK_OPTIONS_TABLE_END,
};

/* Tell the user why the task cannot start; -1. The message of errno is added if there is one. */
static int refuse(const char *format, ...)
{
	char text[2 * PATH_MAX], *reason = errno ? strerror(errno) : NULL;
	va_list values;
	va_start(values, format);
	vsnprintf(text, sizeof text, format, values);
	va_end(values);
	slurm_error("minibox: %s%s%s", text, reason ? ": " : "", reason ? reason : "");
	return -1;
}

static int wrong(const char *what, const char *value)
{
	errno = 0;
	return refuse("%s: %s", what, value);
}

/* Make the folders above a path, and at its end a folder or an empty file, for something to be mounted on. */
static int make_place(const char *path, int is_folder)
{
	char part[PATH_MAX];
	struct stat there;
	if (stat(path, &there) == 0)
		return 0;
	for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		snprintf(part, sizeof part, "%.*s", (int)(slash - path), path);
		if (mkdir(part, 0755) && errno != EEXIST)
			return refuse("cannot make %s", part);
	}
	if (is_folder)
		return mkdir(path, 0755) && errno != EEXIST ? refuse("cannot make %s", path) : 0;
	int file = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
	return file < 0 ? refuse("cannot make %s", path) : close(file);
}

static int bind_to(const char *root, const char *source, const char *target, int read_only)
{
	char place[PATH_MAX];
	struct stat there;
	if (stat(source, &there))
		return refuse("cannot mount %s", source);
	snprintf(place, sizeof place, "%s%s", root, target);
	if (make_place(place, S_ISDIR(there.st_mode)))
		return -1;
	if (mount(source, place, NULL, MS_BIND | MS_REC, NULL))
		return refuse("cannot mount %s at %s", source, target);
	if (read_only && mount(NULL, place, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return refuse("cannot mount %s read-only", source);
	return 0;
}

/* One SRC[:DST[:FLAGS]] of --container-mounts. */
static int bind_entry(const char *root, char *entry)
{
	char *target = strchr(entry, ':'), *flags = NULL, *rest;
	int read_only = 0;
	if (target)
		*target++ = '\0';
	else
		target = entry;
	if ((flags = strchr(target, ':')))
		*flags++ = '\0';
	if (entry[0] != '/' || target[0] != '/')
		return wrong("--container-mounts: both paths of a mount must begin with '/'", target);
	for (char *flag = flags ? strtok_r(flags, "+", &rest) : NULL; flag; flag = strtok_r(NULL, "+", &rest)) {
		if (!strcmp(flag, "ro"))
			read_only = 1;
		else if (strcmp(flag, "rw") && strcmp(flag, "rbind") && strcmp(flag, "rprivate") && strcmp(flag, "rslave"))
			return wrong("--container-mounts: unknown flag", flag);
	}
	return bind_to(root, entry, target, read_only);
}

static int bind_system(const char *root)
{
	const char *paths[] = {"/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/passwd", "/etc/group"};
	for (size_t number = 0; number < sizeof paths / sizeof *paths; number++)
		if (access(paths[number], F_OK) == 0 && bind_to(root, paths[number], paths[number], 0))
			return -1;
	return 0;
}

static int bind_image(const char *root)
{
	char path[PATH_MAX], line[PATH_MAX];
	int failed = 0;
	snprintf(path, sizeof path, "%s%s", root, BINDS);
	FILE *list = fopen(path, "re");
	if (!list)
		return errno == ENOENT ? 0 : refuse("cannot read %s", path);
	while (!failed && fgets(line, sizeof line, list)) {
		line[strcspn(line, "\n")] = '\0';
		failed = line[0] && bind_to(root, line, line, 1);
	}
	fclose(list);
	return failed ? -1 : 0;
}

static int bind_home(const char *root, spank_t spank)
{
	uid_t user;
	struct passwd *entry;
	if (spank_get_item(spank, S_JOB_UID, &user) != ESPANK_SUCCESS || !(entry = getpwuid(user)))
		return wrong("--container-mount-home", "this user has no home directory");
	return bind_to(root, entry->pw_dir, entry->pw_dir, 0);
}

static int bind_all(const char *root, spank_t spank)
{
	if (bind_image(root) || bind_system(root) || (given[HOME] && bind_home(root, spank)))
		return -1;
	char *mounts = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL, *rest;
	int failed = 0;
	for (char *entry = mounts ? strtok_r(mounts, ",", &rest) : NULL; entry && !failed; entry = strtok_r(NULL, ",", &rest))
		failed = bind_entry(root, entry);
	free(mounts);
	return failed;
}

/* The image of a named container that an earlier step of the job made on this node, or else of --container-image. */
static int find_image(spank_t spank, char *image, size_t size)
{
	char path[PATH_MAX], part[PATH_MAX + 32], node[256];
	uint32_t job;
	snprintf(image, size, "%s", given[IMAGE] ? given[IMAGE] : "");
	if (given[NAME]) {
		if (!given[NAME][0] || strchr(given[NAME], '/'))
			return wrong("--container-name: not a name", given[NAME]);
		if (gethostname(node, sizeof node) || spank_get_item(spank, S_JOB_ID, &job) != ESPANK_SUCCESS)
			return wrong("--container-name", "the node and the job are unknown");
		snprintf(path, sizeof path, "%s/names/%s.%u.%s", folder, node, job, given[NAME]);
		ssize_t length = readlink(path, image, size - 1);
		if (length >= 0) {
			image[length] = '\0';
		} else if (image[0]) { /* tasks of one node come here together: renaming is atomic */
			snprintf(part, sizeof part, "%s.%d", path, (int)getpid());
			if (symlink(image, part) || rename(part, path))
				return refuse("cannot remember --container-name=%s", given[NAME]);
		} else {
			return wrong("--container-name: this job has no such container here; add --container-image", given[NAME]);
		}
	}
	if (image[0] != '/')
		return wrong("--container-image: not the path of a folder", image);
	return 0;
}

/* Mount the image at FOLDER/root/image, writable by an overlay in memory, with the mounts; then make it the root. */
static int enter(spank_t spank, const char *image)
{
	char place[PATH_MAX], root[PATH_MAX];
	snprintf(place, sizeof place, "%s/root", folder);
	snprintf(root, sizeof root, "%s/root/image", folder);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return refuse("cannot have mounts of its own");
	if (mount("minibox", place, "tmpfs", 0, "mode=755") || chdir(place))
		return refuse("cannot mount at %s", place);
	if (mkdir("lower", 0755) || mkdir("upper", 0755) || mkdir("work", 0755) || mkdir("image", 0755))
		return refuse("cannot make folders in %s", place);
	/* paths of overlay know no quotes: the image gets a short one */
	if (mount(image, "lower", NULL, MS_BIND, NULL))
		return refuse("--container-image=%s", image);
	if (mount("minibox", "image", "overlay", 0, "lowerdir=lower,upperdir=upper,workdir=work"))
		return refuse("cannot mount an overlay of %s", image);
	if (bind_all(root, spank))
		return -1;
	if (given[READONLY] && mount(NULL, root, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return refuse("--container-readonly");
	if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
		return refuse("cannot enter %s", image);
	return 0;
}

/* Whether --container-env names the variable, and the host has it. */
static int keeps(spank_t spank, const char *variable)
{
	size_t length = strlen(variable);
	char value[2];
	for (const char *name = given[ENV]; name; name = strchr(name, ',') ? strchr(name, ',') + 1 : NULL)
		if (strcspn(name, ",") == length && !strncmp(name, variable, length))
			return spank_getenv(spank, variable, value, sizeof value) != ESPANK_ENV_NOEXIST;
	return 0;
}

static int set_environment(spank_t spank)
{
	char *line = NULL;
	size_t size = 0;
	FILE *list = fopen(ENVIRONMENT, "re");
	if (!list)
		return errno == ENOENT ? 0 : refuse("cannot read %s", ENVIRONMENT);
	while (getline(&line, &size, list) > 0) {
		line[strcspn(line, "\n")] = '\0';
		char *value = strchr(line, '=');
		if (!value)
			continue;
		*value++ = '\0';
		if (!keeps(spank, line))
			spank_setenv(spank, line, value, 1);
	}
	free(line);
	fclose(list);
	return 0;
}

int slurm_spank_init(spank_t spank, int count, char **words)
{
	spank_context_t context = spank_context();
	if (context != S_CTX_LOCAL && context != S_CTX_ALLOCATOR && context != S_CTX_REMOTE)
		return 0;
	if (count != 1)
		return wrong("plugstack.conf", "the plugin needs one argument, a folder");
	folder = words[0];
	for (int number = 0; options[number].name; number++)
		if (spank_option_register(spank, &options[number]) != ESPANK_SUCCESS)
			return wrong("cannot register the option", options[number].name);
	return 0;
}

/* In the process of the task, still as root. */
int slurm_spank_task_init_privileged(spank_t spank, int count, char **words)
{
	(void)count, (void)words;
	char image[PATH_MAX];
	if (!given[IMAGE] && !given[NAME])
		return 0;
	return find_image(spank, image, sizeof image) ? -1 : enter(spank, image);
}

/* There, as the user, just before the program starts. */
int slurm_spank_task_init(spank_t spank, int count, char **words)
{
	(void)count, (void)words;
	if (!given[IMAGE] && !given[NAME])
		return 0;
	const char *where = given[WORKDIR] ? given[WORKDIR] : "/";
	if (chdir(where))
		return refuse("--container-workdir=%s", where);
	return set_environment(spank);
}
