{{/* The names of the objects: RELEASE-canvastune, or only RELEASE if it contains the chart's name. A service's name has no dot. */}}
{{- define "canvastune.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $release := replace "." "-" .Release.Name -}}
{{- default (contains $name $release | ternary $release (printf "%s-%s" $release $name)) .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "canvastune.mlflow.fullname" -}}{{ include "canvastune.fullname" . }}-mlflow{{- end -}}

{{/* The labels of a selector, which must never change: (dict "root" . "component" "mlflow"). */}}
{{- define "canvastune.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "canvastune.labels" -}}
{{ include "canvastune.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: canvastune
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The reference of an image: (dict "root" . "image" .Values.images.mlflow). A digest overrides the tag. */}}
{{- define "canvastune.image" -}}
{{- $registry := default .root.Values.images.registry .image.registry -}}
{{- if $registry }}{{ trimSuffix "/" $registry }}/{{ end }}{{ .image.repository -}}
{{- if .image.digest -}}@{{ .image.digest }}{{- else -}}:{{ default .root.Chart.AppVersion .image.tag }}{{- end -}}
{{- end -}}

{{- define "canvastune.pullSecrets" -}}
{{- with .Values.images.pullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* PodSecurity restricted, for a pod and for a container. */}}
{{- define "canvastune.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- include "canvastune.volumeGroup" . }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "canvastune.volumeGroup" -}}
{{- with .Values.podSecurity.fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end -}}

{{- define "canvastune.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* "true" if MLflow stores anything in files. */}}
{{- define "canvastune.mlflow.usesSqlite" -}}
{{- if or (not .Values.mlflow.database.existingSecret.name) (and .Values.mlflow.auth.enabled (not .Values.mlflow.auth.database.existingSecret.name)) -}}true{{- end -}}
{{- end -}}

{{- define "canvastune.mlflow.usesVolume" -}}
{{- if or (include "canvastune.mlflow.usesSqlite" .) (not .Values.mlflow.artifacts.destination) -}}true{{- end -}}
{{- end -}}

{{- define "canvastune.mlflow.claim" -}}
{{- default (include "canvastune.mlflow.fullname" .) .Values.mlflow.persistence.existingClaim -}}
{{- end -}}

{{- define "canvastune.workspace.claim" -}}
{{- default (printf "%s-workspace" (include "canvastune.fullname" .)) .Values.workspace.existingClaim -}}
{{- end -}}

{{- define "canvastune.mlflow.serviceAccount" -}}
{{- default (include "canvastune.mlflow.fullname" .) .Values.mlflow.serviceAccount.name -}}
{{- end -}}

{{- define "canvastune.training.serviceAccount" -}}
{{- default (printf "%s-training" (include "canvastune.fullname" .)) .Values.training.serviceAccount -}}
{{- end -}}

{{- define "canvastune.upload.serviceAccount" -}}
{{- default (printf "%s-upload" (include "canvastune.fullname" .)) .Values.pipeline.upload.serviceAccount -}}
{{- end -}}

{{- define "canvastune.training.runtime" -}}
{{- default (include "canvastune.fullname" .) .Values.training.runtime -}}
{{- end -}}

{{/* Every host name by which pods can call MLflow, shortest first, as JSON. */}}
{{- define "canvastune.mlflow.serviceNames" -}}
{{- $name := include "canvastune.mlflow.fullname" . -}}
{{- $inNamespace := printf "%s.%s" $name .Release.Namespace -}}
{{- list $name $inNamespace (printf "%s.svc" $inNamespace) (printf "%s.svc.%s" $inNamespace .Values.clusterDomain) | toJson -}}
{{- end -}}

{{/* --allowed-hosts replaces MLflow's default list, so it lists everything: services, port-forward, ingress. */}}
{{- define "canvastune.mlflow.allowedHosts" -}}
{{- $hosts := list "localhost" "localhost:*" "127.0.0.1" "127.0.0.1:*" -}}
{{- range include "canvastune.mlflow.serviceNames" . | fromJsonArray -}}
{{- $hosts = concat $hosts (list . (printf "%s:%d" . (int $.Values.mlflow.service.port))) -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- range .Values.ingress.hosts -}}
{{- $hosts = concat $hosts (list . (printf "%s:*" .)) -}}
{{- end -}}
{{- end -}}
{{- concat $hosts .Values.mlflow.extraAllowedHosts | uniq | join "," -}}
{{- end -}}

{{/* The origins from which MLflow's own pages are loaded: their calls carry that origin. */}}
{{- define "canvastune.mlflow.allowedOrigins" -}}
{{- $origins := list -}}
{{- range include "canvastune.mlflow.serviceNames" . | fromJsonArray -}}
{{- $origins = concat $origins (list (printf "http://%s" .) (printf "http://%s:%d" . (int $.Values.mlflow.service.port))) -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- range .Values.ingress.hosts -}}
{{- $origins = concat $origins (list (printf "https://%s" .) (printf "http://%s" .)) -}}
{{- end -}}
{{- end -}}
{{- concat $origins .Values.mlflow.extraAllowedOrigins | uniq | join "," -}}
{{- end -}}

{{- define "canvastune.mlflow.url" -}}
http://{{ include "canvastune.mlflow.fullname" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.mlflow.service.port }}
{{- end -}}

{{/* The run config's section `cluster`, as JSON. A TrainJob has no place for scheduler and pod priority: its runtime has
them. The pipeline's steps mount the workspace at /workspace, and so do the training pods. */}}
{{- define "canvastune.cluster" -}}
{{- $training := .Values.training -}}
{{- $inRuntime := eq $training.backend "trainjob" -}}
{{- $env := merge (dict) $training.env (dict "MLFLOW_TRACKING_URI" (include "canvastune.mlflow.url" .)) -}}
{{- dict
  "backend" $training.backend
  "nodes" (int $training.nodes)
  "image" (include "canvastune.image" (dict "root" . "image" .Values.images.trainer))
  "pull_secrets" .Values.images.pullSecrets
  "claim" (include "canvastune.workspace.claim" .)
  "mount_path" "/workspace"
  "gpu_resource" (default nil $training.gpuResource)
  "cpu" $training.cpu
  "memory" $training.memory
  "shm" $training.shm
  "env" $env
  "secret_env" $training.secretEnv
  "credentials" (default nil .Values.credentials.existingSecret)
  "fs_group" .Values.podSecurity.fsGroup
  "node_selector" $training.nodeSelector
  "tolerations" $training.tolerations
  "queue" (default nil $training.queue)
  "priority_class" (and $inRuntime (not $training.queue) | ternary nil (default nil $training.priorityClass))
  "scheduler" ($inRuntime | ternary nil (default nil $training.scheduler))
  "service_account" (include "canvastune.training.serviceAccount" .)
  "rdma_resource" (default nil $training.rdmaResource)
  "rdma_count" (int $training.rdmaCount)
  "deadline_hours" $training.deadlineHours
  "queue_hours" $training.queueHours
  "restarts" (int $training.restarts)
  "ttl_hours" $training.ttlHours
  "runtime" (include "canvastune.training.runtime" .)
  | toPrettyJson -}}
{{- end -}}
